"""MySQL or MariaDB: engine, tables, errors, transactions and statements with many rows."""
