"""What an operator has to know of: causes found in the central database, told once by mail or webhook, reminded of, and ended. Knows nothing of Dagster."""
