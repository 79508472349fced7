"""Stored procedures of MySQL/MariaDB: their texts (one `.sql` file each, named like the procedure), installing and calling them.

What belongs here: how a procedure gets into the database and how its result sets get out. What its results mean belongs to the
package that calls it.
"""
