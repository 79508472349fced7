"""The central database: tables, engine rules, bulk loading, migrations. Nothing here knows campaigns' logic or Dagster."""
