/*
dblock force_release, for PostgreSQL 14 to 18

Shows who holds one lock; and, told which of them, ends that session, only if it still holds that lock. The server then gives
back all that the session held and hands the lock on. What the session was doing is rolled back or stays half done: look
first whether it is really gone or stuck (inspect.sql shows who it is). A lock that is shared or has slots can have several
holders, each a row: one is ended with each run.

Needs       to look: a login. To end: the holder's role, or pg_signal_backend, or a superuser; a superuser's session needs a
            superuser. One statement, for the primary: a standby's locks are its own.

Settings    read from the session
    dblock.target, dblock.step    the names of the lock
    dblock.key                    or its number; with both they must agree
    dblock.confirm                the pid of the holder to end. Absent: only look. It is cleared by this script

psql        psql -c "set dblock.target = 'web-01'" -c "set dblock.step = 'b'" -f force_release.sql
            then, with the pid that it showed:
            psql -c "set dblock.target = 'web-01'" -c "set dblock.step = 'b'" -c "set dblock.confirm = '4123'" \
                 -f force_release.sql
a driver    SELECT set_config('dblock.key', '3736245238665493732', false), set_config('dblock.confirm', '4123', false)
            the text of this file, without parameters

Columns, one row for each holder, or one that says why there is none
    outcome                 what happened, or what to do next
    pid, host, "user"       the holder's session
    application             its application_name: dblock1 SECONDS-SINCE-1970 TENANT TARGET STEP, if dblock took the lock
    since                   of the grant, as that label says
    activity, query_start   what the session does, and since when; empty where the role may not see it
    key                     the lock
    mode                    exclusive or shared; or slot 0, slot 1, ... of a lock with slots, if its names were given and not its
                            key alone: then it is shown as shared

Operators are written in full, since a schema of the search_path may define its own.
*/
WITH
wish AS MATERIALIZED (
    SELECT COALESCE(pg_catalog.current_setting('dblock.target',  true), '') AS target,
           COALESCE(pg_catalog.current_setting('dblock.step',    true), '') AS step,
           COALESCE(pg_catalog.current_setting('dblock.key',     true), '') AS key,
           COALESCE(pg_catalog.current_setting('dblock.confirm', true), '') AS confirm,
           pg_catalog.current_setting('server_encoding') OPERATOR(pg_catalog.=) 'UTF8'
               AND pg_catalog.current_setting('client_encoding') OPERATOR(pg_catalog.=) 'UTF8' AS utf8,
           -- Read above, cleared here: it must not hit another session in a later run.
           pg_catalog.set_config('dblock.confirm', '', false) AS cleared
),

-- The names are not judged as acquire.sql judges them: names that it refuses have a key that nobody holds.
named AS MATERIALIZED (
    SELECT wish.confirm,
           names.bytes,
           CASE WHEN names.bytes IS NOT NULL
                THEN pg_catalog.concat('x', pg_catalog.substr(pg_catalog.encode(
                         pg_catalog.sha256(names.bytes), 'hex'), 1, 16))::bit(64)::bigint
           END AS key_of_names,
           CASE WHEN wish.key OPERATOR(pg_catalog.~) '^-?[0-9]{1,19}$'
                THEN CASE WHEN wish.key::numeric OPERATOR(pg_catalog.>=) (-9223372036854775808)::numeric
                           AND wish.key::numeric OPERATOR(pg_catalog.<=) 9223372036854775807::numeric
                          THEN wish.key::bigint
                     END
           END AS key_of_number,
           wish.key OPERATOR(pg_catalog.<>) '' AS by_number,
           wish.target OPERATOR(pg_catalog.<>) '' OR wish.step OPERATOR(pg_catalog.<>) '' AS by_names
    FROM wish,
         LATERAL (SELECT CASE WHEN wish.target OPERATOR(pg_catalog.<>) '' AND wish.step OPERATOR(pg_catalog.<>) ''
                                   AND (wish.utf8 OR pg_catalog.concat(wish.target, wish.step)
                                                     OPERATOR(pg_catalog.!~) E'[^\\u0001-\\u007f]')
                              THEN pg_catalog.convert_to(
                                       pg_catalog.concat(wish.target, pg_catalog.chr(31), wish.step), 'UTF8')
                         END) AS names(bytes)
),

judged AS MATERIALIZED (
    SELECT named.confirm,
           named.bytes,
           COALESCE(named.key_of_number, named.key_of_names) AS key,
           CASE WHEN NOT named.by_number AND NOT named.by_names
                    THEN 'refused: neither dblock.target and dblock.step nor dblock.key is set'
                WHEN named.by_number AND named.key_of_number IS NULL
                    THEN 'refused: dblock.key is no key'
                WHEN named.by_names AND named.key_of_names IS NULL
                    THEN 'refused: dblock.target and dblock.step must both be set; and names beyond ASCII need'
                         ' server_encoding and client_encoding UTF8'
                WHEN named.by_names AND named.by_number
                     AND named.key_of_names OPERATOR(pg_catalog.<>) named.key_of_number
                    THEN pg_catalog.concat('refused: dblock.target and dblock.step have the key ', named.key_of_names,
                                           ', dblock.key is another')
                WHEN named.confirm OPERATOR(pg_catalog.!~) '^([1-9][0-9]{0,9})?$'
                    THEN 'refused: dblock.confirm is no pid'
           END AS refused
    FROM named
),

-- Read once: each reading of pg_locks is another moment.
locks AS MATERIALIZED (
    SELECT l.locktype, l.virtualtransaction, l.transactionid, l.pid, l.granted, l.objsubid,
           COALESCE(l.pid::pg_catalog.text, l.virtualtransaction) AS owner,
           l.mode OPERATOR(pg_catalog.=) 'ShareLock' AS shared,
           (l.classid::bigint OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) l.objid::bigint AS key
    FROM pg_catalog.pg_locks AS l
    WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted AND l.objsubid OPERATOR(pg_catalog.=) 1
          AND l.database OPERATOR(pg_catalog.=) (
              SELECT d.oid FROM pg_catalog.pg_database AS d
              WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
       OR l.locktype OPERATOR(pg_catalog.=) 'transactionid' AND l.pid IS NULL
),

-- A lock with slots is held as two: itself shared, and one of its permits, whose keys follow from the names.
slots AS MATERIALIZED (
    SELECT l.owner, number.slot
    FROM judged,
         pg_catalog.generate_series(0, 998) AS number(slot),
         LATERAL (SELECT pg_catalog.concat('x', pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(
                             judged.bytes OPERATOR(pg_catalog.||) pg_catalog.decode('1f', 'hex')
                                          OPERATOR(pg_catalog.||) pg_catalog.convert_to(number.slot::pg_catalog.text, 'UTF8')
                         ), 1, 8), 'hex'))::bit(64)::bigint) AS permit(key),
         locks AS l
    WHERE l.key OPERATOR(pg_catalog.=) permit.key AND l.locktype OPERATOR(pg_catalog.=) 'advisory' AND NOT l.shared
),

holders AS MATERIALIZED (
    SELECT l.pid, l.virtualtransaction, judged.key,
           judged.confirm OPERATOR(pg_catalog.=) l.pid::pg_catalog.text AS confirmed,
           pg_catalog.bool_and(l.shared) AS shared,
           pg_catalog.min(slots.slot) FILTER (WHERE l.shared) AS slot
    FROM judged
    JOIN locks AS l ON l.key OPERATOR(pg_catalog.=) judged.key AND l.locktype OPERATOR(pg_catalog.=) 'advisory'
    LEFT JOIN slots ON slots.owner OPERATOR(pg_catalog.=) l.owner
    WHERE judged.refused IS NULL
    GROUP BY l.pid, l.virtualtransaction, judged.key, judged.confirm
),

-- Where the server would refuse, the whole statement would fail and say less: its rule is asked first.
described AS MATERIALIZED (
    SELECT h.pid, h.virtualtransaction, h.key, h.confirmed, h.shared, h.slot,
           h.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AS own,
           a.application_name, a.usename, a.state, a.query_start,
           COALESCE(a.client_hostname, pg_catalog.host(a.client_addr),
                    CASE WHEN a.client_port OPERATOR(pg_catalog.=) -1 THEN 'local' END) AS host,
           me.rolsuper
               OR NOT COALESCE(theirs.rolsuper, true)
                  AND (pg_catalog.pg_has_role(a.usesysid, 'USAGE')
                       OR pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')) AS permitted
    FROM holders AS h
    JOIN pg_catalog.pg_roles AS me ON me.rolname OPERATOR(pg_catalog.=) CURRENT_USER
    LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid OPERATOR(pg_catalog.=) h.pid
    LEFT JOIN pg_catalog.pg_roles AS theirs ON theirs.oid OPERATOR(pg_catalog.=) a.usesysid
),

-- A prepared transaction's locks have no pid. What names the transaction is the lock on its own transaction id.
prepared AS MATERIALIZED (
    SELECT l.virtualtransaction,
           CASE WHEN p.gid OPERATOR(pg_catalog.~) '^[ -~]*$'
                THEN pg_catalog.ltrim(pg_catalog.quote_literal(p.gid))
                ELSE pg_catalog.concat(
                         'E''',
                         pg_catalog.regexp_replace(
                             pg_catalog.encode(pg_catalog.convert_to(p.gid, pg_catalog.getdatabaseencoding()), 'hex'),
                             '(..)', E'\\\\x\\1', 'g'),
                         '''')
           END AS quoted
    FROM locks AS l
    JOIN pg_catalog.pg_prepared_xacts AS p ON p.transaction OPERATOR(pg_catalog.=) l.transactionid
    WHERE l.locktype OPERATOR(pg_catalog.=) 'transactionid' AND l.granted
      AND p.database OPERATOR(pg_catalog.=) pg_catalog.current_database()
),

-- The one place that ends anything: at most one row is confirmed.
ended AS MATERIALIZED (
    SELECT d.pid,
           pg_catalog.pg_terminate_backend(d.pid, 5000) AS gone
    FROM described AS d
    WHERE CASE WHEN d.confirmed AND d.permitted THEN NOT d.own ELSE false END
)

SELECT CASE
           WHEN judged.refused IS NOT NULL
               THEN judged.refused
           WHEN d.key IS NULL AND judged.confirm OPERATOR(pg_catalog.<>) ''
               THEN pg_catalog.format('nothing was ended: pid %s does not hold this lock, nor does anybody', judged.confirm)
           WHEN d.key IS NULL
               THEN 'nobody holds this lock'
           WHEN d.pid IS NULL
               THEN pg_catalog.concat('held by a prepared transaction, which has no session to end; to end it: '
                                      'ROLLBACK PREPARED ', prepared.quoted)
           WHEN judged.confirm OPERATOR(pg_catalog.<>) '' AND pg_catalog.bool_or(d.confirmed) OVER () IS NOT TRUE
               THEN pg_catalog.format('nothing was ended: pid %s does not hold this lock, this session does', judged.confirm)
           WHEN d.own
               THEN pg_catalog.format('nothing was ended: your own session holds it; release.sql gives it back, or '
                                      'SELECT pg_catalog.pg_advisory_unlock%s(%s)',
                                      CASE WHEN d.shared THEN '_shared' END, d.key)
           WHEN d.permitted IS NOT TRUE
               THEN pg_catalog.concat(CASE WHEN d.confirmed THEN 'nothing was ended' ELSE 'held' END,
                                      ': you may not end this session; its own role may, a member of pg_signal_backend '
                                      'unless it is a superuser''s, or a superuser')
           WHEN NOT d.confirmed
               THEN pg_catalog.format('held: to end this session, SET dblock.confirm = ''%s'' and run this again', d.pid)
           WHEN ended.gone
               THEN 'ended: the server has given back all that the session held'
           ELSE 'told to end, but not gone after 5 s: run this again without dblock.confirm to see whether it still holds'
       END AS outcome,
       d.pid,
       pg_catalog.regexp_replace(d.host, '[^ -~]', '?', 'g') AS host,
       pg_catalog.regexp_replace(d.usename::pg_catalog.text, '[^ -~]', '?', 'g') AS "user",
       d.application_name AS application,
       pg_catalog.to_timestamp(
           pg_catalog.substring(d.application_name, '^dblock1 ([0-9]{1,11}) ')::double precision) AS since,
       d.state AS activity,
       d.query_start,
       judged.key,
       CASE WHEN d.slot IS NOT NULL THEN pg_catalog.concat('slot ', d.slot)
            WHEN d.shared THEN 'shared'
            WHEN d.key IS NOT NULL THEN 'exclusive'
       END AS mode
FROM judged
LEFT JOIN described AS d ON true
LEFT JOIN prepared ON d.pid IS NULL AND prepared.virtualtransaction OPERATOR(pg_catalog.=) d.virtualtransaction
LEFT JOIN ended    ON ended.pid OPERATOR(pg_catalog.=) d.pid
ORDER BY d.confirmed DESC NULLS LAST, d.pid;
