-- The database's users: each may do what its program does, and nothing else.
--
-- Run this as an administrator after `postroad migrate`, and again after an upgrade that adds a table. MySQL
-- grants nothing on a table that does not exist. Every statement may be repeated.
--
-- The users are locked until they have passwords:
--     ALTER USER 'postroad_api'@'%' IDENTIFIED BY '...' ACCOUNT UNLOCK;
-- Then give each program its own POSTROAD_DATABASE_URL. The validator has none.
--
-- tests/integration/test_database_users.py checks each grant, and that each user is denied the rest.

-- `postroad migrate` alone.
CREATE USER IF NOT EXISTS 'postroad_migrate'@'%' REQUIRE SSL ACCOUNT LOCK;
GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP, INDEX, REFERENCES
    ON postroad.* TO 'postroad_migrate'@'%';

CREATE USER IF NOT EXISTS 'postroad_api'@'%' REQUIRE SSL ACCOUNT LOCK;
GRANT SELECT, INSERT, UPDATE ON postroad.tasks TO 'postroad_api'@'%';
GRANT SELECT, INSERT ON postroad.task_bodies TO 'postroad_api'@'%';
GRANT SELECT, INSERT ON postroad.task_events TO 'postroad_api'@'%';
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.outbox TO 'postroad_api'@'%';
GRANT SELECT, INSERT, UPDATE ON postroad.deliveries TO 'postroad_api'@'%';

-- It takes the mails from Kafka, and reads no task.
CREATE USER IF NOT EXISTS 'postroad_sender'@'%' REQUIRE SSL ACCOUNT LOCK;
GRANT SELECT, INSERT, UPDATE ON postroad.deliveries TO 'postroad_sender'@'%';

-- It deletes old bodies and reads none.
CREATE USER IF NOT EXISTS 'postroad_status'@'%' REQUIRE SSL ACCOUNT LOCK;
GRANT SELECT, INSERT, UPDATE ON postroad.tasks TO 'postroad_status'@'%';
GRANT SELECT (task_id), DELETE ON postroad.task_bodies TO 'postroad_status'@'%';
GRANT INSERT ON postroad.task_events TO 'postroad_status'@'%';
GRANT SELECT, INSERT, UPDATE ON postroad.deliveries TO 'postroad_status'@'%';
GRANT INSERT ON postroad.topic_ids TO 'postroad_status'@'%';

-- `postroad lag`, `replay` and `rebuild`. A rebuild fills tables of its own and swaps two of them in.
CREATE USER IF NOT EXISTS 'postroad_operator'@'%' REQUIRE SSL ACCOUNT LOCK;
GRANT LOCK TABLES ON postroad.* TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, CREATE, ALTER, DROP ON postroad.tasks TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, CREATE, ALTER, DROP ON postroad.task_events TO 'postroad_operator'@'%';
GRANT SELECT, INSERT ON postroad.task_bodies TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, UPDATE ON postroad.deliveries TO 'postroad_operator'@'%';
GRANT SELECT ON postroad.outbox TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, UPDATE ON postroad.replays TO 'postroad_operator'@'%';
GRANT SELECT, INSERT ON postroad.topic_ids TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP ON postroad.tasks_rebuild TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, DELETE, CREATE, DROP ON postroad.tasks_rebuild_found TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, CREATE, ALTER, DROP ON postroad.tasks_before_rebuild TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP ON postroad.task_events_rebuild TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, DELETE, CREATE, DROP ON postroad.task_events_rebuild_found TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, CREATE, ALTER, DROP ON postroad.task_events_before_rebuild TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, UPDATE, CREATE, DROP ON postroad.task_bodies_rebuild TO 'postroad_operator'@'%';
GRANT SELECT, INSERT, UPDATE, CREATE, DROP ON postroad.deliveries_rebuild TO 'postroad_operator'@'%';
