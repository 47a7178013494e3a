/*
dblock release, for PostgreSQL 14 and later

Gives back the lock that acquire.sql took last in this session, of one with slots the permit and then the rest, and the session
its application_name. Locks that were taken one after the other are given back in reverse, one with each run.

A lock of a transaction (dblock.scope = 'transaction') ends with the COMMIT or ROLLBACK. Before that, this only makes sure that
it is still held; after it there is nothing to give back.

Needs       the session of acquire.sql, in autocommit: the work must be committed before the lock is given back, since the
            next holder would not see it otherwise. For a lock of a transaction: that transaction.

psql        psql -v ON_ERROR_STOP=1 -c "set dblock.target = 'web-01'" -c "set dblock.step = 'b'" \
                 -f acquire.sql -f b.sql -f release.sql
a driver    the text of this file as a command of its own, on the connection of acquire.sql

If it fails, the lock stays as it was, and ends with the session:
    55000  this session holds no lock of acquire.sql; or its application_name is no longer the lock's label, so that
           behind a pooler the lock could be another client's
    0A000  inside a transaction, and the lock is not the transaction's
*/
DO $dblock$
DECLARE
    old_search_path     pg_catalog.text := pg_catalog.current_setting('search_path');
    held                pg_catalog.jsonb;             -- written by acquire.sql, one entry for each lock
    last                pg_catalog.jsonb;
    refused_here        pg_catalog.text;
    refused_nested      pg_catalog.text;
    failure             pg_catalog.text;
    failure_code        pg_catalog.text := '55000';
BEGIN
    -- From here on every operator and function is PostgreSQL's own, whatever the caller's schemas hold.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

    -- In a transaction a nested COMMIT fails for the same reason as this one: see acquire.sql.
    BEGIN
        COMMIT;
    EXCEPTION WHEN invalid_transaction_termination THEN
        refused_here := SQLERRM;
    END;
    BEGIN
        EXECUTE 'DO $nested$ BEGIN COMMIT; END $nested$';
    EXCEPTION WHEN invalid_transaction_termination THEN
        refused_nested := SQLERRM;
    END;

    BEGIN
        held := COALESCE(NULLIF(pg_catalog.current_setting('dblock.held', true), ''), '[]');
        last := held -> -1;
        failure := CASE
            WHEN last IS NULL
                THEN 'this session holds no lock that acquire.sql took'
            WHEN last ->> 'label' IS DISTINCT FROM pg_catalog.current_setting('application_name')
                THEN 'application_name is not the label that acquire.sql gave this session, so the lock may be another'
                     ' client''s behind a pooler; it is kept until the session ends'
            WHEN EXISTS (
                    SELECT FROM (VALUES ((last ->> 'key')::bigint), ((last ->> 'permit')::bigint)) AS needed(key)
                    WHERE needed.key NOT IN (
                        SELECT (l.classid::bigint << 32) | l.objid::bigint
                        FROM pg_catalog.pg_locks AS l
                        WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                          AND l.pid = pg_catalog.pg_backend_pid()))
                THEN 'the lock with key ' || (last ->> 'key') || ' was given back by somebody else while it was held'
            END;
    EXCEPTION WHEN data_exception THEN
        failure := 'dblock.held does not hold what acquire.sql wrote';
    END;

    IF failure IS NULL AND refused_here = refused_nested AND last ->> 'scope' IS DISTINCT FROM 'transaction' THEN
        failure_code := '0A000';
        failure := 'inside a transaction (BEGIN, psql -1, several statements in one command) the lock would be given back'
                   ' before the work is committed; COMMIT first';
    END IF;
    IF failure IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = 'dblock: ' || failure, ERRCODE = failure_code;
    END IF;

    IF last ->> 'scope' = 'transaction' THEN
        PERFORM pg_catalog.set_config('search_path', old_search_path, true);
        RETURN;
    END IF;
    PERFORM CASE WHEN last ->> 'permit' IS NOT NULL THEN pg_catalog.pg_advisory_unlock((last ->> 'permit')::bigint) END,
            CASE WHEN (last ->> 'shared')::boolean THEN pg_catalog.pg_advisory_unlock_shared((last ->> 'key')::bigint)
                 ELSE pg_catalog.pg_advisory_unlock((last ->> 'key')::bigint) END,
            pg_catalog.set_config('application_name', last ->> 'before', false),
            pg_catalog.set_config('dblock.slot', COALESCE(held #>> '{-2,slot}', ''), false),
            pg_catalog.set_config('dblock.held', (held - -1)::pg_catalog.text, false);
END
$dblock$;
