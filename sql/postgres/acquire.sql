/*
dblock acquire, for PostgreSQL 14 and later

Takes the lock for one step on one target, and waits for it in the queue that dblock's other doors (Python, `dblock run`)
use too. It is held by this session until release.sql or the session's end; or, where that is asked for, by the transaction
until COMMIT or ROLLBACK. What runs meanwhile runs for one tenant at a time on each target. Nothing is created in the database.

Needs       a login, no other rights. A connection to the primary server itself, or through a pooler in session mode.
            Autocommit: not inside a transaction, nor in one command together with other statements. With scope transaction
            the reverse: a transaction, READ COMMITTED; then also through a pooler in transaction mode.

Settings    read from the session, and cleared by this script whatever comes of it; empty means absent
    dblock.target, dblock.step    the names of the lock; required
    dblock.tenant                 for whom: a label that those who wait, and inspect.sql, show
    dblock.timeout                seconds to wait, such as 600 or 0.5; 0: do not wait; absent: without limit
    dblock.shared                 on: beside others that are shared too, but never beside an exclusive holder
    dblock.slots                  1 to 999: at most so many at a time. Beside shared ones, never beside an exclusive holder.
                                  All callers should ask for the same number: who asks for less uses only the first slots
    dblock.scope                  session; or transaction: the lock ends with the COMMIT or ROLLBACK, not before
    dblock.database               the database this must be
    dblock.key                    the key this must be, as `dblock key` or key.sql computes it

It leaves   dblock.slot           of a lock with slots the number of the own one, 0 to slots - 1: a number that nobody else
                                  has at the time. Empty for other locks. SHOW dblock.slot, or current_setting('dblock.slot')
            dblock.held           what release.sql needs

psql        psql -v ON_ERROR_STOP=1 \
                 -c "set dblock.target = 'web-01'" -c "set dblock.step = 'b'" -c "set dblock.timeout = '600'" \
                 -f acquire.sql -f b.sql -f release.sql
in one      psql -1 -v ON_ERROR_STOP=1 \
transaction      -c "set local dblock.target = 'web-01'" -c "set local dblock.step = 'b'" \
                 -c "set local dblock.scope = 'transaction'" -f acquire.sql -f b.sql
            or the same between BEGIN and COMMIT. The settings belong inside: there they take the same way through a
            pooler, and what was set before BEGIN would be back after a ROLLBACK
a driver    on one connection in autocommit, each line a command of its own:
                SELECT set_config('dblock.target', 'web-01', false), set_config('dblock.step', 'b', false)
                the text of this file                -- one statement; mind the driver's own command timeout
                the step's statements
                the text of release.sql

If it fails it reports one of these, AND ENDS THE SESSION, so that nothing runs without the lock:
    55P03  not acquired in time; the message says who holds it since when
    22023  a name or setting is not acceptable
    0A000  no lock could be trusted here: a transaction, or for scope transaction none, or one that sees only what was
           committed before the lock was granted (REPEATABLE READ, SERIALIZABLE); a standby, a read-only session, another
           database
    55006  this session holds the lock already, in whatever shape
    40P01  chosen as the victim of a deadlock
    57014  cancelled
A client that reconnects by itself (psql at a terminal, some drivers) goes on in a NEW session without the lock: stop at
the first error (ON_ERROR_STOP). One kind of session is not ended: it has advisory locks already which its
application_name does not show to be its own, taken by hand, or by this script while application_name was empty. Behind a
pooler in transaction mode they could be another client's.

A pooler in transaction or statement mode cannot be recognised from inside. It hands settings and session's locks of one
client to another: through one, use nothing but scope transaction in transaction mode, and not for some only.

Who waits in a transaction holds back vacuum in the whole database, and CREATE INDEX CONCURRENTLY until the transaction ends;
who waits outside of one does not.

Whose client is killed while it waits stays in the queue until it is granted, and goes then; with the setting
client_connection_check_interval = '1s', which must be there before this script begins, within a second.

Several locks: take them in ascending order of their keys, everywhere. Two who wait here for each other are no deadlock that
the server sees.

How a lock is shown, and how to free it: inspect.sql, force_release.sql.
*/
DO $dblock$
DECLARE
    -- The caller's settings, to be given back as the strings they were.
    old_search_path     pg_catalog.text := pg_catalog.current_setting('search_path');
    old_idle_timeout    pg_catalog.text := pg_catalog.current_setting('idle_session_timeout');
    old_read_only       pg_catalog.text := pg_catalog.current_setting('default_transaction_read_only');
    old_name            pg_catalog.text := pg_catalog.current_setting('application_name');

    -- The wishes.
    target              pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.target',   true), '');
    step                pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.step',     true), '');
    tenant              pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.tenant',   true), '');
    wished_timeout      pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.timeout',  true), '');
    wished_shared       pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.shared',   true), '');
    wished_slots        pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.slots',    true), '');
    wished_scope        pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.scope',    true), '');
    wished_database     pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.database', true), '');
    wished_key          pg_catalog.text := COALESCE(pg_catalog.current_setting('dblock.key',      true), '');

    -- The session.
    read_only           boolean := pg_catalog.current_setting('transaction_read_only');
    isolation           pg_catalog.text := pg_catalog.current_setting('transaction_isolation');
    may_commit          boolean;                      -- false: inside a transaction
    held                pg_catalog.jsonb;             -- dblock.held, see below
    believed            boolean;                      -- the list agrees with this session's locks and name
    explained           boolean;                      -- they are certainly this client's, so that the session may be ended
    this_database       pg_catalog.oid;

    -- The lock: itself exclusive or shared; with slots shared, and one permit exclusive.
    names               pg_catalog.bytea;
    key                 bigint;
    shared              boolean;                      -- the lock itself
    permits             bigint[] := '{}';             -- the keys of the permits 0, 1, 2, ...
    slot                integer;                      -- the number of the own permit
    in_transaction      boolean;

    -- Its queue. Two-integer locks: (high, 0) is held shared by all who wait, (high, n) is the n-th waiter's ticket,
    -- (high, -1) the gate under which tickets are numbered.
    high                integer;
    high_unsigned       bigint;                       -- as pg_locks.classid shows it
    tried               boolean := false;
    ticket              integer;                      -- NULL: not drawn yet
    predecessor         integer;                      -- the next ticket below the own; 0: none, this one is the head
    may_try             boolean;                      -- in this slice, for the lock itself
    acquired            boolean := false;
    leftover            boolean := false;             -- an error may have left something of the lock behind
    finished            boolean;

    -- Time.
    slice               integer;                      -- milliseconds, the longest wait in one statement
    deadline            timestamp with time zone;     -- NULL: without limit
    timer_due           timestamp with time zone;     -- when statement_timeout cancels this statement; NULL: never
    report_due          timestamp with time zone := pg_catalog.clock_timestamp();
    pause               double precision := 0;        -- seconds, between two looks for a permit

    -- The label's fields tenant, step, target: in the order in which they give way where it is too long.
    encoded             pg_catalog.text[];
    fitted              pg_catalog.text[];
    shortened           boolean[];
    longest             integer;
    waiting_fields      pg_catalog.text;
    holding_fields      pg_catalog.text;
    waiting_label       pg_catalog.text;

    failure             pg_catalog.text;
    failure_code        pg_catalog.text;

    control_character   pg_catalog.text;
    beyond_ascii        pg_catalog.text;
    refused_here        pg_catalog.text;
    refused_nested      pg_catalog.text;
    obstacle            pg_catalog.text;
    name                pg_catalog.text;
    value               pg_catalog.text;
    time_width          integer;
BEGIN
    -- From here on every operator and function is PostgreSQL's own, whatever the caller's schemas hold.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

    FOREACH name IN ARRAY ARRAY['target', 'step', 'tenant', 'timeout', 'shared', 'slots', 'scope', 'database', 'key'] LOOP
        PERFORM pg_catalog.set_config('dblock.' || name, '', false);
    END LOOP;

    -- A transaction, also the implicit one of a command with several statements, does not let this block commit. Inside
    -- an exception block COMMIT always fails: here for that reason, unless in a transaction; in the nested DO always
    -- for the other one. The texts tell them apart, in any language.
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
    may_commit := refused_here <> refused_nested;

    in_transaction := wished_scope = 'transaction';
    shared := wished_shared = 'on' OR wished_slots <> '';

    -- dblock.held lists the locks that this script took in this session, the last one last: each with its key and what
    -- else release.sql needs, its label, and the application_name that stood there before. It is believed where every
    -- advisory lock of the session is in it, each entry was made on top of the one before it, and the last one's label is
    -- the session's name. Behind a pooler in transaction mode list and locks belong to the backend, but the name to the
    -- client.
    BEGIN
        held := COALESCE(NULLIF(pg_catalog.current_setting('dblock.held', true), ''), '[]');
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_locks AS l
                       WHERE l.locktype = 'advisory' AND l.pid = pg_catalog.pg_backend_pid()) THEN
            held := '[]';
            believed := true;
        ELSE
            believed := held #>> '{-1,label}' = old_name
                AND NOT EXISTS (
                    SELECT FROM pg_catalog.jsonb_array_elements(held) WITH ORDINALITY AS entry(lock, place)
                    WHERE place > 1 AND lock ->> 'before' IS DISTINCT FROM held -> (place::integer - 2) ->> 'label')
                AND NOT EXISTS (
                    SELECT FROM pg_catalog.pg_locks AS l
                    WHERE l.locktype = 'advisory' AND l.pid = pg_catalog.pg_backend_pid()
                      AND NOT (l.objsubid = 1 AND EXISTS (
                            SELECT FROM pg_catalog.jsonb_array_elements(held) AS entry(lock)
                            WHERE (l.classid::bigint << 32) | l.objid::bigint
                                  IN ((lock ->> 'key')::bigint, (lock ->> 'permit')::bigint))));
        END IF;
    EXCEPTION WHEN data_exception THEN
        believed := false;                            -- somebody else wrote dblock.held
    END;
    IF believed IS NOT TRUE THEN
        believed := false;
        held := '[]';
    END IF;
    -- A name with which the connection itself began is no other client's: PgBouncer begins its connections without one,
    -- and gives them a client's name later, unless that client has none, who then finds the last client's on the backend.
    -- An entry of a transaction is of this one: it ends as its lock does.
    explained := believed AND (held = '[]' OR held #>> '{0,scope}' = 'transaction'
                               OR held #>> '{0,before}' <> '' AND held #>> '{0,before}' = (
                     SELECT s.reset_val FROM pg_catalog.pg_settings AS s WHERE s.name = 'application_name'));

    -- A cancel can hit between two statements of this block, where nothing catches it. Until the lock is held the session
    -- is therefore kept such that it ends as soon as it is idle, finds no table and writes nothing before it does. Not
    -- where it holds locks that may be another client's. In a transaction it cannot be kept so: a failure would take the
    -- settings back; what is taken there is given back otherwise, see below.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', NOT may_commit);
    IF may_commit THEN
        IF explained THEN
            PERFORM pg_catalog.set_config('idle_session_timeout', '1ms', false),
                    pg_catalog.set_config('default_transaction_read_only', 'on', false);
        END IF;
        COMMIT;
    END IF;

    -- Judge ------------------------------------------------------------------------------------------------------------

    BEGIN
        control_character := '[' || pg_catalog.chr(1) || '-' || pg_catalog.chr(31) || pg_catalog.chr(127) || ']';
        beyond_ascii      := '[^' || pg_catalog.chr(1) || '-' || pg_catalog.chr(127) || ']';

        failure_code := '22023';
        FOREACH name IN ARRAY ARRAY['target', 'step'] LOOP
            value := CASE name WHEN 'target' THEN target ELSE step END;
            failure := COALESCE(failure, 'dblock.' || name || CASE
                WHEN value = ''
                    THEN ' is not set'
                WHEN value ~ beyond_ascii
                     AND (pg_catalog.current_setting('server_encoding') <> 'UTF8'
                          OR pg_catalog.current_setting('client_encoding') <> 'UTF8')
                    THEN ' is not ASCII, so an encoding on the way could have made another name of it: that needs'
                         ' server_encoding and client_encoding UTF8, here they are '
                         || pg_catalog.current_setting('server_encoding') || ' and '
                         || pg_catalog.current_setting('client_encoding')
                WHEN pg_catalog.octet_length(value) > 255
                    THEN ' has ' || pg_catalog.octet_length(value) || ' bytes; at most 255 are allowed'
                WHEN value ~ control_character
                    THEN ' holds a control character'
                WHEN pg_catalog.left(value, 1) = ' ' OR pg_catalog.right(value, 1) = ' '
                    THEN ' begins or ends with a space'
                END);
        END LOOP;

        names := pg_catalog.convert_to(target, 'UTF8') || pg_catalog.decode('1f', 'hex') || pg_catalog.convert_to(step, 'UTF8');
        key := ('x' || pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(names), 1, 8), 'hex'))::bit(64)::bigint;
        high := (key >> 32)::integer;
        high_unsigned := high::bigint & 4294967295;

        failure := COALESCE(failure, CASE
            WHEN wished_timeout <> '' AND wished_timeout !~ '^[0-9]{1,7}([.][0-9]{1,3})?$'
                THEN 'dblock.timeout is no number of seconds like 600 or 0.5: ' || pg_catalog.quote_literal(wished_timeout)
            WHEN wished_timeout <> '' AND wished_timeout::numeric > 2147483
                THEN 'dblock.timeout is more than 2147483 seconds: ' || wished_timeout
            WHEN wished_shared NOT IN ('', 'on', 'off')
                THEN 'dblock.shared is neither on nor off: ' || pg_catalog.quote_literal(wished_shared)
            WHEN wished_slots <> '' AND wished_slots !~ '^[1-9][0-9]{0,2}$'
                THEN 'dblock.slots is no number from 1 to 999: ' || pg_catalog.quote_literal(wished_slots)
            WHEN wished_slots <> '' AND wished_shared = 'on'
                THEN 'dblock.slots and dblock.shared=on exclude each other'
            WHEN wished_scope NOT IN ('', 'session', 'transaction')
                THEN 'dblock.scope is neither session nor transaction: ' || pg_catalog.quote_literal(wished_scope)
            WHEN wished_key NOT IN ('', key::pg_catalog.text)
                THEN 'dblock.key is ' || pg_catalog.quote_literal(wished_key) || ', but these names have the key ' || key
            END);

        IF failure IS NULL THEN
            failure_code := '0A000';
            failure := CASE
                WHEN NOT may_commit AND NOT in_transaction
                    THEN 'inside a transaction (BEGIN, psql -1, several statements in one command) the lock would end'
                         ' before the work is committed; send acquire.sql, the step and release.sql each as commands of'
                         ' their own, in autocommit; or set dblock.scope to transaction'
                WHEN may_commit AND in_transaction
                    THEN 'dblock.scope=transaction needs a transaction (BEGIN, psql -1): in autocommit the lock would end at'
                         ' once, with this command'
                WHEN in_transaction AND isolation IN ('repeatable read', 'serializable')
                    THEN 'under ' || pg_catalog.upper(isolation) || ' the transaction''s snapshot is older than the grant: it'
                         ' would not see what the last holder has committed; use READ COMMITTED'
                WHEN old_name ~ '^dblock1 ' AND held = '[]'
                    THEN 'application_name is the label of a lock which this session does not hold: a pooler in transaction'
                         ' mode gives one client''s locks to another; connect directly. If the lock was given back by'
                         ' hand, set another application_name'
                WHEN pg_catalog.pg_is_in_recovery()
                    THEN 'this server is a hot standby, whose locks exclude nobody on the primary; connect to the primary'
                WHEN read_only
                    THEN 'this session is read-only, as on a server that is no longer the primary; connect to the primary'
                WHEN wished_database NOT IN ('', pg_catalog.current_database()::pg_catalog.text)
                    THEN 'connected to database ' || pg_catalog.quote_ident(pg_catalog.current_database())
                         || ', but dblock.database asks for ' || pg_catalog.quote_ident(wished_database)
                         || ': callers in two databases do not exclude each other'
                END;
        END IF;

        IF failure IS NULL THEN
            IF wished_slots <> '' THEN
                SELECT pg_catalog.array_agg(('x' || pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(
                           names || pg_catalog.decode('1f', 'hex') || pg_catalog.convert_to(number::pg_catalog.text, 'UTF8')
                       ), 1, 8), 'hex'))::bit(64)::bigint ORDER BY number)
                INTO permits
                FROM pg_catalog.generate_series(0, wished_slots::integer - 1) AS number;
            END IF;

            failure_code := '55006';
            SELECT 'this session (pid ' || l.pid || ') holds this lock already'
                   || CASE WHEN believed THEN '; a lock is never taken twice'
                           ELSE ', and not by this script for this client: another client''s, behind a pooler in'
                                ' transaction mode, or taken by hand' END
            INTO failure
            FROM pg_catalog.pg_locks AS l
            WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.pid = pg_catalog.pg_backend_pid()
              AND (l.classid::bigint << 32) | l.objid::bigint = ANY (key || permits)
            LIMIT 1;
        END IF;

        IF failure IS NULL THEN
            -- All three fields together have some 40 bytes of the label, so what is far beyond that is not encoded.
            SELECT pg_catalog.array_agg(
                       CASE bytes
                           WHEN ''::pg_catalog.bytea  THEN '-'
                           WHEN '-'::pg_catalog.bytea THEN '%2D'
                           ELSE (SELECT pg_catalog.string_agg(
                                            CASE WHEN byte < 128 AND pg_catalog.chr(byte) ~ '[A-Za-z0-9._-]'
                                                 THEN pg_catalog.chr(byte)
                                                 ELSE '%' || pg_catalog.upper(pg_catalog.lpad(pg_catalog.to_hex(byte), 2, '0'))
                                            END, '' ORDER BY place)
                                 FROM pg_catalog.generate_series(0, LEAST(pg_catalog.length(bytes), 63) - 1) AS place,
                                      LATERAL pg_catalog.get_byte(bytes, place) AS byte)
                       END ORDER BY field)
            INTO encoded
            FROM (VALUES (1, pg_catalog.convert_to(tenant, 'UTF8')),
                         (2, pg_catalog.convert_to(step,   'UTF8')),
                         (3, pg_catalog.convert_to(target, 'UTF8'))) AS given(field, bytes);

            -- The time takes 10 digits, and a w before them while waiting.
            FOREACH time_width IN ARRAY ARRAY[10, 11] LOOP
                fitted := encoded;
                shortened := ARRAY[false, false, false];
                WHILE (SELECT pg_catalog.sum(pg_catalog.length(field) + shortened[place]::integer)
                       FROM pg_catalog.unnest(fitted) WITH ORDINALITY AS f(field, place)) > 63 - 8 - time_width - 3 LOOP
                    SELECT place INTO longest
                    FROM pg_catalog.unnest(fitted) WITH ORDINALITY AS f(field, place)
                    ORDER BY pg_catalog.length(field) DESC, place LIMIT 1;
                    fitted[longest] := pg_catalog.left(fitted[longest],
                                                       CASE WHEN fitted[longest] ~ '%..$' THEN -3 ELSE -1 END);
                    shortened[longest] := true;
                END LOOP;
                value := fitted[1] || CASE WHEN shortened[1] THEN '~ ' ELSE ' ' END
                      || fitted[3] || CASE WHEN shortened[3] THEN '~ ' ELSE ' ' END
                      || fitted[2] || CASE WHEN shortened[2] THEN '~'  ELSE ''  END;
                IF time_width = 10 THEN
                    holding_fields := value;
                ELSE
                    waiting_fields := value;
                END IF;
            END LOOP;

            this_database := (SELECT d.oid FROM pg_catalog.pg_database AS d
                              WHERE d.datname = pg_catalog.current_database());
            slice := LEAST(900, 900 * EXTRACT(epoch FROM pg_catalog.current_setting('deadlock_timeout')::interval));
            deadline := pg_catalog.clock_timestamp() + (NULLIF(wished_timeout, '') || ' s')::interval;
            timer_due := pg_catalog.statement_timestamp()
                         + NULLIF(pg_catalog.current_setting('statement_timeout'), '0')::interval;
        END IF;
    EXCEPTION WHEN query_canceled OR OTHERS THEN
        failure := SQLERRM;
        failure_code := SQLSTATE;
    END;

    -- Take, or wait ----------------------------------------------------------------------------------------------------

    -- In slices. Each is a block that ends in an error, which takes back the transaction's locks but not the session's. Waits
    -- take only the transaction's: where a cancel meets the grant of a session's lock, the error leaves it behind.
    --
    -- After each slice a COMMIT ends the snapshot too. In a transaction there is none, and the session would outlive a cancel
    -- that hits between two slices, with what it has of the queue. So there all slices are in one block more, which catches
    -- that, and also a second cancel that hits while the first is dealt with.
    finished := failure IS NOT NULL;
    WHILE NOT finished LOOP
        BEGIN
            LOOP
                BEGIN
                    -- Who is in the way: for the error at the end of the time, and for a notice at once and every 30 seconds.
                    IF failure IS NULL AND tried AND pg_catalog.clock_timestamp()
                                                     >= LEAST(deadline, CASE WHEN ticket IS NOT NULL THEN report_due END) THEN
                        report_due := pg_catalog.clock_timestamp() + interval '30 s';
                        PERFORM pg_catalog.pg_stat_clear_snapshot();    -- names are read once in a transaction
                        SELECT CASE
                                   WHEN holder.others IS NULL THEN 'nobody holds it at this moment'
                                   WHEN holder.pid IS NULL    THEN 'held by a prepared transaction'
                                   WHEN holder.believed
                                       THEN CASE holder.tenant WHEN '-' THEN 'held by a session'
                                                               ELSE 'held by tenant ' || holder.tenant END
                                            || ' (pid ' || holder.pid || COALESCE(', host ' || holder.host, '') || ') since '
                                            || pg_catalog.to_char(holder.since,
                                                   CASE WHEN holder.since::date = pg_catalog.clock_timestamp()::date
                                                        THEN 'HH24:MI:SS' ELSE 'YYYY-MM-DD HH24:MI:SS' END)
                                   ELSE 'held by a session (pid ' || holder.pid
                                        || COALESCE(', application ' || NULLIF(holder.name, ''), '')
                                        || COALESCE(', host ' || holder.host, '') || ')'
                               END
                               || CASE WHEN holder.others > 1 THEN ' and ' || holder.others || ' others'
                                       WHEN holder.others = 1 THEN ' and 1 other' ELSE '' END
                               || CASE WHEN queue.ahead > 0 THEN '; ' || queue.ahead || ' ahead' ELSE '' END
                        INTO obstacle
                        FROM (SELECT pg_catalog.count(*) AS ahead
                              FROM pg_catalog.pg_locks AS l
                              WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted AND l.mode = 'ExclusiveLock'
                                AND l.classid::bigint = high_unsigned AND l.database = this_database
                                AND l.objid::bigint BETWEEN 1 AND COALESCE(ticket::bigint - 1, 2147483647)) AS queue
                        LEFT JOIN LATERAL (
                              SELECT l.pid, a.application_name AS name, said.tenant, said.since, said.believed,
                                     COALESCE(a.client_hostname, pg_catalog.host(a.client_addr),
                                              CASE WHEN a.client_port = -1 THEN 'local' END) AS host,
                                     pg_catalog.count(*) OVER () - 1 AS others
                              FROM pg_catalog.pg_locks AS l
                              LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
                              LEFT JOIN LATERAL (
                                    SELECT field[2] AS tenant, pg_catalog.to_timestamp(field[1]::float8) AS since,
                                           pg_catalog.starts_with(encoded[3], pg_catalog.rtrim(field[3], '~'))
                                           AND pg_catalog.starts_with(encoded[2], pg_catalog.rtrim(field[4], '~')) AS believed
                                    FROM pg_catalog.regexp_match(
                                        a.application_name, '^dblock1 ([0-9]{1,12}) ([^ ]+) ([^ ]+) ([^ ]+)$') AS field
                                    ) AS said ON true
                              WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.database = this_database
                                AND (l.classid::bigint << 32) | l.objid::bigint = key
                              ORDER BY said.believed DESC NULLS LAST, said.since, l.pid
                              LIMIT 1) AS holder ON true;
                        -- Octopus Deploy acts on ##octopus, wherever it stands in what a step prints.
                        obstacle := pg_catalog.replace(obstacle, '##', '#?');

                        IF pg_catalog.clock_timestamp() >= deadline THEN
                            failure_code := '55P03';
                            failure := step || '@' || target || ' not acquired '
                                       || CASE WHEN wished_timeout ~ '[1-9]' THEN 'in ' || wished_timeout || ' s'
                                               ELSE 'without waiting' END
                                       || ': ' || obstacle;
                        ELSE
                            RAISE NOTICE 'dblock: waiting for %@%: %', step, target, obstacle;
                        END IF;
                    END IF;

                    IF failure IS NULL AND NOT leftover THEN
                        IF tried THEN
                            waiting_label := COALESCE(waiting_label, 'dblock1 w' || pg_catalog.floor(EXTRACT(
                                                 epoch FROM pg_catalog.clock_timestamp())) || ' ' || waiting_fields);
                            PERFORM pg_catalog.set_config('application_name', waiting_label, in_transaction);
                        END IF;

                        BEGIN
                            PERFORM pg_catalog.set_config('lock_timeout', GREATEST(1, LEAST(slice, pg_catalog.ceil(
                                        1000 * EXTRACT(epoch FROM deadline - pg_catalog.clock_timestamp())
                                    )))::integer || 'ms', true);
                            may_try := false;
                            IF NOT tried THEN
                                -- At once only where nobody waits: everybody who does holds (high, 0) shared.
                                tried := true;
                                may_try := pg_catalog.pg_try_advisory_xact_lock(high, 0);
                            ELSIF ticket IS NOT NULL AND predecessor = 0 THEN
                                PERFORM pg_catalog.pg_sleep(LEAST(pause, EXTRACT(
                                            epoch FROM deadline - pg_catalog.clock_timestamp())));
                                PERFORM CASE WHEN shared THEN pg_catalog.pg_advisory_xact_lock_shared(key)
                                             ELSE pg_catalog.pg_advisory_xact_lock(key) END;
                                may_try := true;
                            ELSE
                                IF ticket IS NULL THEN
                                    PERFORM pg_catalog.pg_advisory_xact_lock(high, -1);
                                ELSE
                                    PERFORM pg_catalog.pg_advisory_xact_lock_shared(high, predecessor);
                                END IF;
                                SELECT COALESCE(pg_catalog.max(l.objid::bigint), 0) INTO predecessor
                                FROM pg_catalog.pg_locks AS l
                                WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted AND l.mode = 'ExclusiveLock'
                                  AND l.classid::bigint = high_unsigned AND l.database = this_database
                                  AND l.objid::bigint BETWEEN 1 AND COALESCE(ticket::bigint - 1, 2147483646);
                                IF ticket IS NULL THEN
                                    PERFORM pg_catalog.pg_advisory_lock(high, predecessor + 1);
                                    PERFORM pg_catalog.pg_advisory_lock_shared(high, 0);
                                    ticket := predecessor + 1;
                                END IF;
                            END IF;

                            IF may_try THEN
                                acquired := CASE WHEN shared THEN pg_catalog.pg_try_advisory_lock_shared(key)
                                                 ELSE pg_catalog.pg_try_advisory_lock(key) END;
                                IF acquired AND wished_slots <> '' THEN
                                    SELECT place - 1 INTO slot
                                    FROM pg_catalog.unnest(permits) WITH ORDINALITY AS permit(number, place)
                                    WHERE pg_catalog.pg_try_advisory_lock(number)
                                    LIMIT 1;
                                    IF slot IS NULL THEN
                                        -- Kept until the next look, it would bar those who ask for the whole.
                                        PERFORM pg_catalog.pg_advisory_unlock_shared(key);
                                        acquired := false;
                                        pause := LEAST(0.020, GREATEST(0.001, 1.4 * pause));
                                    END IF;
                                END IF;
                            END IF;
                            RAISE lock_not_available;
                        EXCEPTION WHEN lock_not_available THEN
                            NULL;                     -- the slice is over, whichever way
                        END;
                    END IF;

                    IF acquired AND in_transaction THEN
                        -- What the session holds already, the transaction is granted without a wait.
                        PERFORM CASE WHEN shared THEN pg_catalog.pg_advisory_xact_lock_shared(key)
                                     ELSE pg_catalog.pg_advisory_xact_lock(key) END,
                                CASE WHEN slot IS NOT NULL THEN pg_catalog.pg_advisory_xact_lock(permits[slot + 1]) END;
                        PERFORM CASE WHEN slot IS NOT NULL THEN pg_catalog.pg_advisory_unlock(permits[slot + 1]) END,
                                CASE WHEN shared THEN pg_catalog.pg_advisory_unlock_shared(key)
                                     ELSE pg_catalog.pg_advisory_unlock(key) END;
                    END IF;

                    -- Out of the queue, or not yet in it with ticket and flag: give back what there is of both. Where the lock
                    -- is not acquired, give back also what an error left of it.
                    IF acquired OR failure IS NOT NULL THEN
                        ticket := NULL;
                    END IF;
                    IF ticket IS NULL OR leftover THEN
                        PERFORM CASE WHEN l.objsubid = 1 AND l.mode = 'ShareLock'
                                         THEN pg_catalog.pg_advisory_unlock_shared(number)
                                     WHEN l.objsubid = 1
                                         THEN pg_catalog.pg_advisory_unlock(number)
                                     WHEN l.mode = 'ShareLock'
                                         THEN pg_catalog.pg_advisory_unlock_shared(high, number::integer)
                                     ELSE pg_catalog.pg_advisory_unlock(high, number::integer) END
                        FROM pg_catalog.pg_locks AS l,
                             LATERAL (SELECT CASE l.objsubid WHEN 1 THEN (l.classid::bigint << 32) | l.objid::bigint
                                                             ELSE l.objid::bigint END) AS lock(number)
                        WHERE l.locktype = 'advisory' AND l.pid = pg_catalog.pg_backend_pid()
                          AND CASE l.objsubid WHEN 1 THEN NOT acquired AND number = ANY (key || permits)
                                   ELSE ticket IS NULL AND l.classid::bigint = high_unsigned AND number < 2147483648 END;
                        leftover := false;
                    END IF;
                    finished := acquired OR failure IS NOT NULL;
                EXCEPTION WHEN query_canceled OR OTHERS THEN
                    IF SQLSTATE = '57014' AND timer_due <= pg_catalog.clock_timestamp() THEN
                        timer_due := NULL;            -- statement_timeout, which comes once; a wait has its own limit
                    ELSE
                        failure_code := SQLSTATE;
                        failure := CASE SQLSTATE WHEN '57014' THEN 'waiting for ' || step || '@' || target || ' was cancelled'
                                                 ELSE SQLERRM END;
                    END IF;
                    finished := leftover AND SQLSTATE <> '57014';     -- giving back itself has failed
                    leftover := true;
                    acquired := false;
                    slot     := NULL;
                END;
                EXIT WHEN finished OR may_commit;
            END LOOP;
        EXCEPTION WHEN query_canceled OR OTHERS THEN
            failure_code := SQLSTATE;
            failure  := SQLERRM;
            finished := leftover AND SQLSTATE <> '57014';
            leftover := true;
            acquired := false;
            slot     := NULL;
        END;

        IF may_commit THEN
            COMMIT;
        END IF;
    END LOOP;

    -- Leave ------------------------------------------------------------------------------------------------------------

    IF failure IS NULL THEN
        value := pg_catalog.set_config('application_name', 'dblock1 ' || pg_catalog.floor(EXTRACT(
                     epoch FROM pg_catalog.clock_timestamp())) || ' ' || holding_fields, in_transaction);
        held := held || pg_catalog.jsonb_build_object(
                    'key', key::pg_catalog.text, 'shared', shared, 'slot', slot, 'permit', permits[slot + 1]::pg_catalog.text,
                    'scope', CASE WHEN in_transaction THEN 'transaction' ELSE 'session' END,
                    'label', value, 'before', old_name);
        PERFORM pg_catalog.set_config('dblock.held', held::pg_catalog.text, in_transaction),
                pg_catalog.set_config('dblock.slot', COALESCE(slot::pg_catalog.text, ''), in_transaction),
                pg_catalog.set_config('idle_session_timeout', old_idle_timeout, in_transaction),
                pg_catalog.set_config('default_transaction_read_only', old_read_only, in_transaction),
                pg_catalog.set_config('search_path', old_search_path, in_transaction);
        RETURN;
    END IF;

    IF NOT explained THEN
        -- Under a label that may be another client's, release.sql would give back that one's lock.
        PERFORM pg_catalog.set_config('application_name', CASE WHEN believed THEN 'dblock' ELSE old_name END, false),
                pg_catalog.set_config('search_path', old_search_path, false);
        IF may_commit THEN
            COMMIT;
        END IF;
        RAISE EXCEPTION USING
            MESSAGE = 'dblock: ' || failure,
            ERRCODE = failure_code,
            HINT = 'The lock is not held. The session is not ended, since it has advisory locks that may be another'
                   ' client''s: run nothing that needs the lock.';
    END IF;

    -- A role that is merely set may not end the session of the one who logged in.
    BEGIN
        EXECUTE 'RESET SESSION AUTHORIZATION';
        PERFORM pg_catalog.set_config('role', 'none', false);
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    RAISE EXCEPTION USING
        MESSAGE = 'dblock: ' || failure,
        ERRCODE = failure_code,
        -- Last, because the session ends with it.
        HINT = CASE WHEN pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())
                    THEN 'The lock is not held. The session is ended, so that nothing runs without it.' END;
END
$dblock$;
