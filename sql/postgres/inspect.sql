/*
dblock inspect, for PostgreSQL 14 to 18

Who holds and who waits: one row for each holder of an advisory lock in this database and one for each who waits, the most
urgent first. That is: locks that somebody waits for before those that nobody misses, the longest wait first; below each
holder those who wait for it, in their order.

Needs       a login, no other rights: hosts of other roles' sessions need membership in pg_read_all_stats. Only reads,
            also on a standby. One statement.

psql        psql -f inspect.sql
a driver    the text of this file, without parameters

Columns
    state           held or waiting
    position        of one who waits: 1 is next. Empty for one who does not wait in dblock's queue
    target, step    the names of the lock. They are shown where the lock's key proves them; with a ~ at the end where a
                    long name was shortened on its way here: that one is only said by the session
    tenant          for whom, as the session says
    since, seconds  of the grant, or of the beginning of the wait
    pid, host, "user"   the session; no pid: a prepared transaction, which outlives its session
    to_free         of a holder: the statement that ends it, and gives back ALL that its session holds
    mode            exclusive or shared; or slot 0, slot 1, ... of one who holds a lock with slots, where its names are known and
                    not shortened. Otherwise such a lock is shown as the two that it is: shared, and a bigint, its permit.
                    Of those who wait in dblock's queue it is known of the first only; the others are shown as exclusive
    key             the lock's number, as `dblock key` and key.sql compute it
    lock            dblock; or somebody else's advisory lock: one bigint, or two integers. Locks of dblock's queue are not
                    shown but counted, as position; one that belongs to nobody who waits is shown with its numbers
    application     application_name, where that is not the label of this lock; or the prepared transaction
    blocked_by      the pids of the holders and of those ahead; 0: a prepared transaction

Whatever cannot be known, or not by this role, is empty. Texts come from other people's sessions: characters that a terminal
would obey or not show are replaced, those in names by %XX as in the label; outside UTF-8 all beyond ASCII. So is the second
of two #, since Octopus Deploy obeys ##octopus.

Operators are written in full, since a schema of the search_path may define its own. No statement but this one is needed, so
search_path is left alone.
*/
WITH
here AS MATERIALIZED (
    SELECT d.oid AS database,
           pg_catalog.clock_timestamp() AS now,
           utf8,
           CASE WHEN utf8
                -- controls; soft hyphen; directions, separators and other characters without a shape; tags
                THEN E'[\\u0001-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202f'
                     '\\u2060-\\u206f\\ufeff\\ufff0-\\ufffb\\U000e0000-\\U000e0fff]'
                ELSE '[^ -~]'
           END AS hidden
    FROM pg_catalog.pg_database AS d,
         LATERAL (SELECT pg_catalog.current_setting('server_encoding') OPERATOR(pg_catalog.=) 'UTF8'
                     AND pg_catalog.current_setting('client_encoding') OPERATOR(pg_catalog.=) 'UTF8') AS way(utf8)
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
),

-- Read once: each reading of pg_locks is another moment.
locks AS MATERIALIZED (
    SELECT l.locktype, l.virtualtransaction, l.transactionid, l.pid, l.granted, l.waitstart, l.objsubid,
           COALESCE(l.pid::pg_catalog.text, l.virtualtransaction) AS owner,
           l.mode OPERATOR(pg_catalog.=) 'ShareLock' AS shared,
           l.classid::bigint AS classid,
           l.objid::bigint   AS objid,
           CASE WHEN l.objsubid OPERATOR(pg_catalog.=) 1
                THEN (l.classid::bigint OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) l.objid::bigint
           END AS key
    FROM pg_catalog.pg_locks AS l, here
    WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.database OPERATOR(pg_catalog.=) here.database
       OR l.locktype OPERATOR(pg_catalog.=) 'transactionid' AND l.pid IS NULL
),

-- A prepared transaction's locks have no pid. What names the transaction is the lock on its own transaction id.
prepared AS MATERIALIZED (
    SELECT l.virtualtransaction,
           p.gid,
           p.owner,
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

-- Labels: dblock1 TIME TENANT TARGET STEP. Anybody can write anything there, so nothing that stands there may fail: a field
-- is cut into units which are a character each, and what is no valid UTF-8 stays as it is.
labels AS MATERIALIZED (
    SELECT a.pid,
           part[1] OPERATOR(pg_catalog.=) 'w' AS waiting,
           pg_catalog.to_timestamp(part[2]::double precision) AS since,
           CASE WHEN part[3] OPERATOR(pg_catalog.<>) '-' THEN name.shown[1] END AS tenant,
           name.shown[2] AS target,
           name.shown[3] AS step,
           name.shortened,
           name.bytes,
           pg_catalog.concat('x', pg_catalog.substr(digest.hex, 1, 16))::bit(64)::bigint AS key,
           pg_catalog.concat('x', pg_catalog.substr(digest.hex, 1,  8))::bit(32)::bigint AS classid
    FROM here,
         pg_catalog.pg_stat_activity AS a,
         pg_catalog.regexp_match(
             a.application_name, '^dblock1 (w?)([0-9]{1,11}) ([^ ]+) ([^ ]+) ([^ ]+)$') AS part,
         LATERAL (
             SELECT pg_catalog.array_agg(
                        pg_catalog.concat(field.shown, CASE WHEN said.cut THEN '~' END) ORDER BY said.place) AS shown,
                    pg_catalog.bool_or(said.cut)
                        FILTER (WHERE said.place OPERATOR(pg_catalog.>) 1) AS shortened,
                    pg_catalog.string_agg(field.bytes, pg_catalog.decode('1f', 'hex') ORDER BY said.place)
                        FILTER (WHERE said.place OPERATOR(pg_catalog.>) 1) AS bytes
             FROM (SELECT raw.place,
                          raw.text OPERATOR(pg_catalog.~) '~$' AS cut,
                          -- A cut in the middle of a character leaves its first bytes, which say nothing.
                          pg_catalog.regexp_replace(
                              raw.text, '(%[CD].|%E.(%[89AB].)?|%F.(%[89AB].){0,2})?~$', '') AS text
                   FROM pg_catalog.unnest(part[3:5]) WITH ORDINALITY AS raw(text, place)) AS said,
             LATERAL (
                 SELECT pg_catalog.string_agg(
                            CASE WHEN unit.letter OPERATOR(pg_catalog.~) here.hidden THEN unit.text
                                 ELSE COALESCE(unit.letter, unit.text)
                            END, '' ORDER BY unit.place) AS shown,
                        pg_catalog.string_agg(unit.bytes, '' ORDER BY unit.place) AS bytes
                 FROM (SELECT cut.place, cut.text[1] AS text, byte.bytes,
                              CASE WHEN cut.text[1] OPERATOR(pg_catalog.~) '^%[2-7].$'
                                     OR pg_catalog.length(cut.text[1]) OPERATOR(pg_catalog.>) 3 AND here.utf8
                                   THEN pg_catalog.convert_from(byte.bytes, 'UTF8')
                              END AS letter
                       FROM pg_catalog.regexp_matches(
                                said.text,
                                '(%(C[2-9A-F]|D[0-9A-F])%[89AB][0-9A-F]'
                                '|%(E0%[AB]|E[1-9A-CEF]%[89AB]|ED%[89])[0-9A-F]%[89AB][0-9A-F]'
                                '|%(F0%[9AB]|F[1-3]%[89AB]|F4%8)[0-9A-F](%[89AB][0-9A-F]){2}'
                                '|%[0-9A-F]{2}'
                                '|.)', 'g') WITH ORDINALITY AS cut(text, place),
                            LATERAL (SELECT CASE WHEN pg_catalog.length(cut.text[1]) OPERATOR(pg_catalog.>) 1
                                                 THEN pg_catalog.decode(
                                                          pg_catalog.replace(cut.text[1], '%', ''), 'hex')
                                                 ELSE pg_catalog.convert_to(cut.text[1], 'UTF8')
                                            END) AS byte(bytes)) AS unit) AS field) AS name,
         LATERAL (SELECT pg_catalog.encode(pg_catalog.sha256(name.bytes), 'hex')) AS digest(hex)
    WHERE part IS NOT NULL
),

-- What a key is called is true, whoever says it: the names give the key.
names AS MATERIALIZED (
    SELECT DISTINCT ON (l.key) l.key, l.target, l.step, l.bytes FROM labels AS l WHERE NOT l.shortened ORDER BY l.key
),

-- A lock with slots is held as two: itself shared, and one of its permits, whose keys follow from the names too.
permits AS MATERIALIZED (
    SELECT n.key AS base, number.slot,
           pg_catalog.concat('x', pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(
               n.bytes OPERATOR(pg_catalog.||) pg_catalog.decode('1f', 'hex')
                       OPERATOR(pg_catalog.||) pg_catalog.convert_to(number.slot::pg_catalog.text, 'UTF8')
           ), 1, 8), 'hex'))::bit(64)::bigint AS key
    FROM names AS n, pg_catalog.generate_series(0, 998) AS number(slot)
    WHERE EXISTS (SELECT FROM locks AS l WHERE l.key OPERATOR(pg_catalog.=) n.key AND l.granted AND l.shared)
),
slots AS MATERIALIZED (
    SELECT own.owner, permits.base, permits.key AS permit, permits.slot
    FROM permits
    JOIN locks AS own  ON own.key OPERATOR(pg_catalog.=) permits.key AND own.granted AND NOT own.shared
    JOIN locks AS base ON base.key OPERATOR(pg_catalog.=) permits.base AND base.granted AND base.shared
                      AND base.owner OPERATOR(pg_catalog.=) own.owner
),

-- dblock's queue stands in two-integer locks, whose first number is the key's high half: everybody who waits holds
-- (high, 0) shared, and a ticket (high, n) exclusive. One without a ticket is about to draw it.
queue AS MATERIALIZED (
    SELECT l.pid, l.classid,
           pg_catalog.min(l.objid) FILTER (WHERE part.ticket) AS ticket
    FROM locks AS l
    LEFT JOIN labels AS s ON s.pid OPERATOR(pg_catalog.=) l.pid AND s.waiting AND NOT s.shortened,
         LATERAL (SELECT l.granted AND l.shared AND l.objid OPERATOR(pg_catalog.=) 0,
                         l.granted AND NOT l.shared AND l.objid OPERATOR(pg_catalog.>) 0
                                   AND l.objid OPERATOR(pg_catalog.<) 2147483648) AS part(flag, ticket)
    WHERE l.objsubid OPERATOR(pg_catalog.=) 2 AND l.pid IS NOT NULL
    GROUP BY l.pid, l.classid
    HAVING pg_catalog.bool_or(part.flag) AND pg_catalog.bool_or(part.ticket)
        OR pg_catalog.bool_or(s.classid OPERATOR(pg_catalog.=) l.classid)
),
queued AS MATERIALIZED (
    SELECT DISTINCT q.classid FROM queue AS q
),

-- One row for each holder and for each who waits; the queue's own locks are in the row of the one whose they are.
places AS MATERIALIZED (
    SELECT l.pid, l.virtualtransaction, l.classid, l.objid, l.objsubid, l.key,
           l.objsubid OPERATOR(pg_catalog.=) 2 AS pair,
           NOT l.granted AS waiting,
           pg_catalog.bool_and(l.shared) AS shared,
           pg_catalog.min(s.slot) AS slot,
           pg_catalog.min(l.waitstart) AS waitstart,
           NULL::bigint AS ticket
    FROM locks AS l
    LEFT JOIN slots AS s ON s.owner OPERATOR(pg_catalog.=) l.owner AND s.base OPERATOR(pg_catalog.=) l.key AND l.granted
    WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
      AND NOT EXISTS (SELECT FROM queue AS q
                      WHERE q.pid OPERATOR(pg_catalog.=) l.pid AND q.classid OPERATOR(pg_catalog.=) l.classid
                        AND (l.objsubid OPERATOR(pg_catalog.=) 2 OR NOT l.granted OR l.shared))
      AND NOT EXISTS (SELECT FROM slots AS p
                      WHERE p.owner OPERATOR(pg_catalog.=) l.owner AND p.permit OPERATOR(pg_catalog.=) l.key)
    GROUP BY l.pid, l.virtualtransaction, l.classid, l.objid, l.objsubid, l.key, l.granted
  UNION ALL
    SELECT q.pid, NULL, q.classid, NULL, NULL, COALESCE(own.key, said.key, sole.key),
           false, true, COALESCE(own.shared, false), NULL, own.waitstart, q.ticket
    FROM queue AS q
    LEFT JOIN locks AS own  ON own.pid OPERATOR(pg_catalog.=) q.pid AND own.classid OPERATOR(pg_catalog.=) q.classid
                           AND own.objsubid OPERATOR(pg_catalog.=) 1
    LEFT JOIN labels AS said ON said.pid OPERATOR(pg_catalog.=) q.pid AND said.classid OPERATOR(pg_catalog.=) q.classid
                           AND said.waiting AND NOT said.shortened,
         LATERAL (SELECT CASE WHEN pg_catalog.min(l.key) OPERATOR(pg_catalog.=) pg_catalog.max(l.key)
                              THEN pg_catalog.min(l.key)
                         END AS key
                  FROM locks AS l
                  WHERE l.objsubid OPERATOR(pg_catalog.=) 1 AND l.classid OPERATOR(pg_catalog.=) q.classid) AS sole
    -- Just granted, the ticket not yet given back. But a shared one may be the first's look whether a slot is free.
    WHERE own.granted IS NOT TRUE OR own.shared
),

described AS MATERIALIZED (
    SELECT p.pid, p.key, p.waiting, p.shared, p.slot, p.waitstart, p.ticket, p.classid,
           -- In a queue everything counts that bars it, also a foreign lock on one of its own numbers.
           CASE WHEN queued.classid IS NULL THEN p.objsubid END AS apart_objsubid,
           CASE WHEN queued.classid IS NULL THEN p.objid    END AS apart_objid,
           COALESCE(name.target, said.target) AS target,
           COALESCE(name.step, said.step) AS step,
           said.tenant,
           CASE WHEN said.pid IS NOT NULL THEN CASE WHEN said.since OPERATOR(pg_catalog.<=) here.now THEN said.since END
                WHEN p.objsubid IS NOT NULL THEN pg_catalog.date_trunc('second', p.waitstart)
           END AS since,
           COALESCE(a.client_hostname, pg_catalog.host(a.client_addr),
                    CASE WHEN a.client_port OPERATOR(pg_catalog.=) -1 THEN 'local' END) AS host,
           COALESCE(a.usename, x.owner)::pg_catalog.text AS role,
           CASE WHEN p.waiting THEN NULL
                WHEN p.pid IS NULL THEN pg_catalog.concat('ROLLBACK PREPARED ', x.quoted)
                ELSE pg_catalog.concat('SELECT pg_catalog.pg_terminate_backend(', p.pid, ')')
           END AS to_free,
           CASE WHEN p.pair THEN pg_catalog.concat(
                    CASE WHEN queued.classid IS NULL THEN 'integers (' ELSE 'dblock''s queue (' END,
                    pg_catalog.concat('x', pg_catalog.lpad(pg_catalog.to_hex(p.classid), 8, '0'))::bit(32)::integer, ', ',
                    pg_catalog.concat('x', pg_catalog.lpad(pg_catalog.to_hex(p.objid),   8, '0'))::bit(32)::integer, ')')
                WHEN COALESCE(name.target, said.target) IS NOT NULL THEN 'dblock'
                WHEN queued.classid IS NOT NULL THEN 'dblock, names unknown'
                ELSE 'bigint, names unknown'
           END AS lock,
           CASE WHEN p.pid IS NULL THEN pg_catalog.concat('prepared transaction ', x.gid)
                WHEN said.pid IS NULL THEN a.application_name
           END AS application
    FROM here,
         (SELECT places.*,
                 pg_catalog.count(*) FILTER (WHERE NOT places.pair)
                     OVER (PARTITION BY places.pid, places.waiting) AS alike
          FROM places) AS p
    LEFT JOIN queued ON queued.classid OPERATOR(pg_catalog.=) p.classid
    LEFT JOIN prepared AS x ON p.pid IS NULL AND x.virtualtransaction OPERATOR(pg_catalog.=) p.virtualtransaction
    LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid OPERATOR(pg_catalog.=) p.pid
    LEFT JOIN names AS name ON name.key OPERATOR(pg_catalog.=) p.key
    -- The label of this place: of a session with several locks it is that of the last. A shortened one cannot be proved: it
    -- is taken where it can mean no other lock, and says nothing that is known to be false.
    LEFT JOIN labels AS said
           ON said.pid OPERATOR(pg_catalog.=) p.pid AND said.waiting OPERATOR(pg_catalog.=) p.waiting AND NOT p.pair
          AND CASE WHEN said.shortened
                   THEN p.alike OPERATOR(pg_catalog.=) 1
                        AND pg_catalog.starts_with(name.target, pg_catalog.rtrim(said.target, '~')) IS NOT FALSE
                        AND pg_catalog.starts_with(name.step,   pg_catalog.rtrim(said.step,   '~')) IS NOT FALSE
                   ELSE said.key OPERATOR(pg_catalog.=) p.key
              END
)

SELECT CASE WHEN d.waiting THEN 'waiting' ELSE 'held' END AS state,
       CASE WHEN d.ticket IS NOT NULL
            THEN pg_catalog.count(d.ticket) OVER (PARTITION BY d.classid ORDER BY d.ticket)
       END AS position,
       pg_catalog.replace(d.target, '##', '#%23') AS target,
       pg_catalog.replace(d.step,   '##', '#%23') AS step,
       pg_catalog.replace(d.tenant, '##', '#%23') AS tenant,
       d.since,
       pg_catalog.floor(EXTRACT(epoch FROM here.now OPERATOR(pg_catalog.-) d.since))::bigint AS seconds,
       d.pid,
       pg_catalog.replace(pg_catalog.regexp_replace(d.host, here.hidden, '?', 'g'), '##', '#?') AS host,
       pg_catalog.replace(pg_catalog.regexp_replace(d.role, here.hidden, '?', 'g'), '##', '#?') AS "user",
       d.to_free,
       CASE WHEN d.slot IS NOT NULL THEN pg_catalog.concat('slot ', d.slot)
            WHEN d.shared THEN 'shared'
            ELSE 'exclusive'
       END AS mode,
       d.key,
       d.lock,
       pg_catalog.replace(pg_catalog.regexp_replace(d.application, here.hidden, '?', 'g'), '##', '#?') AS application,
       CASE WHEN d.waiting
            THEN pg_catalog.array_remove(
                     pg_catalog.array_agg(COALESCE(d.pid, 0)) OVER (turns ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
                     d.pid)
       END AS blocked_by
FROM described AS d, here
WINDOW same_lock AS (PARTITION BY d.classid, d.apart_objsubid, d.apart_objid),
       -- One who waits for the lock itself, without a ticket, overtakes all but the head of the queue.
       turns AS (same_lock ORDER BY d.waiting, d.waitstart NULLS LAST, d.ticket NULLS LAST, d.pid)
ORDER BY pg_catalog.bool_or(d.waiting) OVER same_lock DESC,
         pg_catalog.min(d.since) FILTER (WHERE d.waiting) OVER same_lock NULLS LAST,
         pg_catalog.min(d.since) OVER same_lock NULLS LAST,
         d.classid, d.apart_objsubid, d.apart_objid,
         pg_catalog.row_number() OVER turns;
