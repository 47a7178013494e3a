/*
dblock key, for PostgreSQL 14 to 18

The number that names the lock for one step on one target, and how it stands in the server's views. Takes no lock.

Needs       a login, no other rights. One statement.

Settings    read from the session, and left as they are
    dblock.target, dblock.step    the names of the lock

psql        psql -c "set dblock.target = 'web-01'" -c "set dblock.step = 'b'" -f key.sql
a driver    SELECT set_config('dblock.target', 'web-01', false), set_config('dblock.step', 'b', false)
            the text of this file, without parameters

Columns
    key                         what pg_advisory_lock takes; the same number as `dblock key` gives
    classid, objid, objsubid    how the lock stands in pg_locks
    in_pg_locks                 a condition that finds the lock's own rows, its holders
    is_free                     a statement that says whether it is free. It takes the lock for a moment, as a transaction's
    mssql                       the resource of the same lock on SQL Server
    refused                     why these names have no key; then everything else is empty

Operators are written in full, since a schema of the search_path may define its own.
*/
WITH
wish AS MATERIALIZED (
    SELECT COALESCE(pg_catalog.current_setting('dblock.target', true), '') AS target,
           COALESCE(pg_catalog.current_setting('dblock.step',   true), '') AS step,
           pg_catalog.current_setting('server_encoding') AS server_encoding,
           pg_catalog.current_setting('client_encoding') AS client_encoding
),

judged AS MATERIALIZED (
    SELECT wish.target, wish.step,
           (SELECT pg_catalog.concat('dblock.', name.argument, reason)
            FROM (VALUES (1, 'target', wish.target), (2, 'step', wish.step)) AS name(place, argument, text),
                 LATERAL (SELECT CASE
                     WHEN name.text OPERATOR(pg_catalog.=) ''
                         THEN ' is not set'
                     WHEN name.text OPERATOR(pg_catalog.~) E'[^\\u0001-\\u007f]'
                          AND (wish.server_encoding OPERATOR(pg_catalog.<>) 'UTF8'
                               OR wish.client_encoding OPERATOR(pg_catalog.<>) 'UTF8')
                         THEN pg_catalog.concat(
                             ' is not ASCII, so an encoding on the way could have made another name of it: that needs'
                             ' server_encoding and client_encoding UTF8, here they are ',
                             wish.server_encoding, ' and ', wish.client_encoding)
                     WHEN pg_catalog.octet_length(name.text) OPERATOR(pg_catalog.>) 255
                         THEN pg_catalog.concat(
                             ' has ', pg_catalog.octet_length(name.text), ' bytes; at most 255 are allowed')
                     WHEN name.text OPERATOR(pg_catalog.~) E'[\\u0001-\\u001f\\u007f]'
                         THEN ' holds a control character'
                     WHEN name.text OPERATOR(pg_catalog.~) '^ | $'
                         THEN ' begins or ends with a space'
                     END) AS judgement(reason)
            WHERE reason IS NOT NULL
            ORDER BY name.place
            LIMIT 1) AS refused
    FROM wish
),

hashed AS MATERIALIZED (
    SELECT judged.refused,
           CASE WHEN judged.refused IS NULL
                THEN pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(
                         pg_catalog.concat(judged.target, pg_catalog.chr(31), judged.step), 'UTF8')), 'hex')
           END AS hash
    FROM judged
),

keys AS MATERIALIZED (
    SELECT hashed.refused,
           ('x' OPERATOR(pg_catalog.||) pg_catalog.substr(hashed.hash, 1, 16))::bit(64)::bigint AS key,
           ('x' OPERATOR(pg_catalog.||) pg_catalog.substr(hashed.hash, 1,  8))::bit(32)::bigint AS classid,
           ('x' OPERATOR(pg_catalog.||) pg_catalog.substr(hashed.hash, 9,  8))::bit(32)::bigint AS objid
    FROM hashed
)

SELECT k.key,
       k.classid,
       k.objid,
       CASE WHEN k.key IS NOT NULL THEN 1 END AS objsubid,
       CASE WHEN k.key IS NOT NULL THEN pg_catalog.format(
           'locktype = ''advisory'' AND objsubid = 1 AND classid = %s AND objid = %s'
           ' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())', k.classid, k.objid)
       END AS in_pg_locks,
       CASE WHEN k.key IS NOT NULL THEN pg_catalog.format('SELECT pg_try_advisory_xact_lock(%s)', k.key) END AS is_free,
       CASE WHEN k.key IS NOT NULL THEN pg_catalog.concat('dblock:', k.key) END AS mssql,
       k.refused
FROM keys AS k;
