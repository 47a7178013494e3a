/*
dblock inspect, for SQL Server 2016 to 2025, Azure SQL Database and Managed Instance

Who holds and who waits: one row for each holder of an application lock (sp_getapplock) in this database and one for each who
waits, the most urgent first. That is: locks that somebody waits for before those that nobody misses, the longest wait first;
below each holder those who wait for it, in their order.

Needs       SQL Server to 2019, Managed Instance    VIEW SERVER STATE
            SQL Server 2022 and later               VIEW SERVER PERFORMANCE STATE
            Azure SQL Database                      VIEW DATABASE STATE; in Basic, S0, S1 and elastic pools the server's
                                                    admin, or a member of ##MS_ServerStateReader##
            Without it the server answers with errors 300 and 297, and nothing is shown. GRANT ... TO [login], in master; in
            Azure SQL Database GRANT VIEW DATABASE STATE TO [user], in this one.
            Only reads, also on a readable secondary, whose locks are its own. Nothing is created. One batch.

sqlcmd      sqlcmd -d shared -W -i inspect.sql
SSMS        connect to the database, open the file, run it
a driver    the text of this file, without parameters

In a session in which acquire.sql has failed nothing runs, nor does this: use another.

Columns, those of PostgreSQL's inspect.sql
    state           held or waiting
    position        of one who waits: 1 is next
    target, step    the names of the lock. They are shown where the lock's key proves them; with a ~ at the end where a
                    long name was shortened on its way here: that one is only said by the session
    tenant          for whom, as the session says
    since, seconds  of the grant, or of the beginning of the wait
    pid             the session_id; none: a distributed transaction which has lost its session
    host, user      host_name and login_name
    to_free         of a holder: the statement that ends it, and gives back ALL that its session holds
    mode            exclusive or shared; or the permit of a lock with slots: slot 0, slot 1, ...; of somebody else's lock also
                    another mode, in the server's letters
    key             the lock's number, as `dblock key` and key.sql compute it
    lock            dblock; or somebody else's application lock: who may take it (0 is public), the name's first 32
                    characters, a hash. A permit whose lock has unknown or shortened names is shown as a lock of its own. The
                    queue for permits is not shown but counted, as position
    application     program_name; or the distributed transaction
    blocked_by      the pids of the holders and of those ahead; 0: a distributed transaction

Whatever cannot be known is empty. Texts come from other people's sessions: characters that a terminal would obey or not show
are replaced, those in names by %XX as in the label.

The label is read by arithmetic, and all texts are compared by their code points, so no collation decides anything.
*/
DECLARE @counting int = CASE WHEN @@OPTIONS & 512 = 0 THEN 1 ELSE 0 END;
SET NOCOUNT ON;

-- In whole seconds, as the labels are.
DECLARE @now datetime2(0) = DATEADD(second, DATEDIFF(second, '2020-01-01', SYSUTCDATETIME()), '2020-01-01');

-- What is not shown: controls; soft hyphen; directions, separators and other characters without a shape; halves of characters;
-- tags; what is no character. Nor the second of two #, since Octopus Deploy obeys ##octopus.
DECLARE @hidden table (low int, high int);
INSERT INTO @hidden (low, high)
VALUES (0, 31), (127, 159), (173, 173), (1564, 1564), (6158, 6158), (8203, 8207), (8232, 8239), (8288, 8303),
       (55296, 57343), (65279, 65279), (65520, 65531), (917504, 921599), (1114112, 2147483647);


-- The requests for locks, read once: each reading is another moment. A resource stands there as 0:[dblock:123]:(5e1fa07c).
-- dblock:123q is the queue of those who want a permit of the lock 123.

DECLARE @requests table (
    session     int,
    lost        uniqueidentifier,                           -- a distributed transaction without a session
    resource    nvarchar(256) COLLATE Latin1_General_BIN2,
    lock_key    bigint,
    in_queue    int,
    holds       int,
    waits       int,                                        -- one who converts its lock holds it and waits
    mode        nvarchar(60)  COLLATE Latin1_General_BIN2,
    waited_ms   bigint,
    slot        int,                                        -- of a lock that is held with a permit: the permit's number
    is_permit   int DEFAULT 0                               -- of another lock that the session holds
);

INSERT INTO @requests (session, lost, resource, lock_key, in_queue, holds, waits, mode, waited_ms)
SELECT l.request_session_id,
       CASE WHEN l.request_session_id < 0 THEN l.request_owner_guid END,
       described.resource,
       dblock.lock_key,
       CASE WHEN dblock.lock_key IS NOT NULL AND described.name LIKE N'%q' THEN 1 ELSE 0 END,
       CASE WHEN l.request_status = N'WAIT' THEN 0 ELSE 1 END,
       CASE WHEN l.request_status LIKE N'GRANT%' THEN 0 ELSE 1 END,
       l.request_mode,
       w.wait_duration_ms
FROM sys.dm_tran_locks AS l
LEFT JOIN sys.dm_os_waiting_tasks AS w
       ON w.session_id = l.request_session_id AND w.resource_address = l.lock_owner_address
CROSS APPLY (SELECT RTRIM(l.resource_description) COLLATE Latin1_General_BIN2) AS said(resource)
CROSS APPLY (SELECT said.resource,
                    CASE WHEN said.resource LIKE N'0:[[]dblock:%]:(%)' AND said.resource NOT LIKE N'%]%]%'
                         THEN SUBSTRING(said.resource, 11, CHARINDEX(N']', said.resource) - 11)
                    END) AS described(resource, name)
CROSS APPLY (SELECT CASE WHEN described.name LIKE N'%q' THEN LEFT(described.name, LEN(described.name) - 1)
                         ELSE described.name
                    END) AS digits(said)
CROSS APPLY (SELECT CASE WHEN digits.said LIKE N'%[0-9]' AND LEN(digits.said) <= 20
                              AND LEFT(digits.said, 1) LIKE N'[-0-9]' AND SUBSTRING(digits.said, 2, 20) NOT LIKE N'%[^0-9]%'
                         THEN CAST(digits.said AS decimal(20))
                    END) AS number(value)
CROSS APPLY (SELECT CASE WHEN number.value BETWEEN -9223372036854775808 AND 9223372036854775807
                              AND CAST(number.value AS nvarchar(21)) = digits.said
                         THEN CAST(number.value AS bigint)
                    END) AS dblock(lock_key)
WHERE l.resource_type = N'APPLICATION'
  AND l.resource_database_id = DB_ID();

IF @@ERROR <> 0
BEGIN
    IF @counting = 1 SET NOCOUNT OFF;
    RETURN;
END;


-- The sessions. The label stands in context_info, padded with zeros. What a batch has set there only its request knows, until
-- it ends.

DECLARE @sessions table (
    session     int PRIMARY KEY,
    host        nvarchar(128) COLLATE Latin1_General_BIN2,
    login       nvarchar(128) COLLATE Latin1_General_BIN2,
    program     nvarchar(128) COLLATE Latin1_General_BIN2,
    label       varchar(128)  COLLATE Latin1_General_BIN2
);

INSERT INTO @sessions (session, host, login, program, label)
SELECT s.session_id,
       s.host_name,
       s.login_name,
       s.program_name,
       LEFT(context.text, NULLIF(PATINDEX('%[^ -~]%', context.text + CHAR(10)), 0) - 1)
FROM sys.dm_exec_sessions AS s
OUTER APPLY (SELECT TOP (1) r.context_info
             FROM sys.dm_exec_requests AS r
             WHERE r.session_id = s.session_id
             ORDER BY r.request_id) AS batch
CROSS APPLY (SELECT CAST(COALESCE(batch.context_info, s.context_info) AS varchar(128)) COLLATE Latin1_General_BIN2
            ) AS context(text)
WHERE s.session_id IN (SELECT r.session FROM @requests AS r);


-- The labels: dblock1 TIME TENANT TARGET STEP. Anybody can write anything there, so nothing that stands there may fail. All
-- are read at once, a byte each time: a character is put together from its bytes, and what makes none stays as it was said.

DECLARE @fields table (
    session     int,
    place       int,                                                        -- 0 TIME, 1 TENANT, 2 TARGET, 3 STEP
    said        varchar(128)  COLLATE Latin1_General_BIN2,
    shortened   int,
    position    int           DEFAULT 1,
    pending     varchar(12)   COLLATE Latin1_General_BIN2 DEFAULT '',       -- of a character: what was said so far,
    code        int           DEFAULT 0,                                    -- its value so far,
    missing     int           DEFAULT 0,                                    -- and how many bytes are still to come
    shown       nvarchar(128) COLLATE Latin1_General_BIN2 DEFAULT N'',
    hex         varchar(256)  COLLATE Latin1_General_BIN2 DEFAULT '',
    PRIMARY KEY (session, place)
);

INSERT INTO @fields (session, place, said, shortened)
SELECT s.session,
       field.place,
       CASE WHEN field.said LIKE '%~' THEN LEFT(field.said, LEN(field.said) - 1) ELSE field.said END,
       CASE WHEN field.said LIKE '%~' THEN 1 ELSE 0 END
FROM @sessions AS s
CROSS APPLY (SELECT CASE WHEN s.label LIKE 'dblock1 %_ %_ %_ %_' AND s.label NOT LIKE '% % % % % %' THEN s.label END
            ) AS five(words)
CROSS APPLY (SELECT CHARINDEX(' ', five.words, 9))                AS b(space)
CROSS APPLY (SELECT CHARINDEX(' ', five.words, b.space + 1))      AS c(space)
CROSS APPLY (SELECT CHARINDEX(' ', five.words, c.space + 1))      AS d(space)
CROSS APPLY (VALUES (0, SUBSTRING(five.words, 9, b.space - 9)),
                    (1, SUBSTRING(five.words, b.space + 1, c.space - b.space - 1)),
                    (2, SUBSTRING(five.words, c.space + 1, d.space - c.space - 1)),
                    (3, SUBSTRING(five.words, d.space + 1, 128))) AS field(place, said)
WHERE field.said IS NOT NULL;

WHILE EXISTS (SELECT 1 FROM @fields AS f WHERE f.position <= LEN(f.said))
    UPDATE f
    SET position = f.position + LEN(unit.said),
        hex      = f.hex + SUBSTRING('0123456789ABCDEF', unit.byte / 16 + 1, 1)
                         + SUBSTRING('0123456789ABCDEF', unit.byte % 16 + 1, 1),
        code     = letter.code,
        missing  = letter.missing,
        pending  = CASE WHEN letter.missing > 0 THEN letter.said ELSE '' END,
        shown    = f.shown + letter.given_up
                 + CASE WHEN letter.missing > 0
                            THEN N''
                        WHEN letter.code IS NULL
                             -- said in more bytes than it needs
                             OR letter.code < CASE LEN(letter.said) WHEN 9 THEN 2048 WHEN 12 THEN 65536 ELSE 0 END
                             OR EXISTS (SELECT 1 FROM @hidden AS h WHERE letter.code BETWEEN h.low AND h.high)
                            THEN letter.said
                        -- NCHAR does not make what is beyond U+FFFF where the database's collation counts code units.
                        ELSE COALESCE(NCHAR(letter.code),
                                      NCHAR(55232 + letter.code / 1024) + NCHAR(56320 + letter.code % 1024))
                   END
    FROM @fields AS f
    CROSS APPLY (SELECT SUBSTRING(f.said, f.position, 3)) AS ahead(said)
    CROSS APPLY (SELECT CASE WHEN ahead.said LIKE '[%][0-9A-F][0-9A-F]' THEN ahead.said ELSE LEFT(ahead.said, 1) END,
                        CASE WHEN ahead.said LIKE '[%][0-9A-F][0-9A-F]'
                             THEN CHARINDEX(SUBSTRING(ahead.said, 2, 1), '123456789ABCDEF') * 16
                                + CHARINDEX(SUBSTRING(ahead.said, 3, 1), '123456789ABCDEF')
                             ELSE UNICODE(ahead.said)
                        END) AS unit(said, byte)
    CROSS APPLY (SELECT f.code * 64 + unit.byte - 128, f.missing - 1, f.pending + unit.said, ''
                 WHERE f.missing > 0 AND unit.byte BETWEEN 128 AND 191
               UNION ALL
                 SELECT CASE WHEN unit.byte < 128              THEN unit.byte
                             WHEN unit.byte BETWEEN 194 AND 223 THEN unit.byte - 192
                             WHEN unit.byte BETWEEN 224 AND 239 THEN unit.byte - 224
                             WHEN unit.byte BETWEEN 240 AND 244 THEN unit.byte - 240
                        END,
                        CASE WHEN unit.byte BETWEEN 194 AND 223 THEN 1
                             WHEN unit.byte BETWEEN 224 AND 239 THEN 2
                             WHEN unit.byte BETWEEN 240 AND 244 THEN 3
                             ELSE 0
                        END,
                        unit.said,
                        f.pending
                 WHERE NOT (f.missing > 0 AND unit.byte BETWEEN 128 AND 191)
                ) AS letter(code, missing, said, given_up)
    WHERE f.position <= LEN(f.said);

DECLARE @labels table (
    session     int PRIMARY KEY,
    waiting     int,
    since       datetime2(0),
    tenant      nvarchar(128) COLLATE Latin1_General_BIN2,
    target      nvarchar(128) COLLATE Latin1_General_BIN2,
    target_cut  nvarchar(1)   COLLATE Latin1_General_BIN2,
    step        nvarchar(128) COLLATE Latin1_General_BIN2,
    step_cut    nvarchar(1)   COLLATE Latin1_General_BIN2,
    preimage    varchar(520)  COLLATE Latin1_General_BIN2   -- of the key, in hex; none where a name was shortened
);

-- A cut in the middle of a character leaves its first bytes, which say nothing.
UPDATE @fields SET shown = shown + pending WHERE shortened = 0;

INSERT INTO @labels (session, waiting, since, tenant, target, target_cut, step, step_cut, preimage)
SELECT moment.session,
       CASE WHEN moment.said LIKE 'w%' THEN 1 ELSE 0 END,
       DATEADD(second, number.seconds % 86400, DATEADD(day, number.seconds / 86400, CAST('1970-01-01' AS datetime2(0)))),
       CASE WHEN tenant.said <> '-' OR tenant.shortened = 1 THEN tenant.shown + LEFT(N'~', tenant.shortened) END,
       target.shown, LEFT(N'~', target.shortened),
       step.shown,   LEFT(N'~', step.shortened),
       CASE WHEN target.shortened = 0 AND step.shortened = 0 THEN target.hex + '1F' + step.hex END
FROM @fields AS moment
JOIN @fields AS tenant ON tenant.session = moment.session AND tenant.place = 1
JOIN @fields AS target ON target.session = moment.session AND target.place = 2
JOIN @fields AS step   ON step.session   = moment.session AND step.place   = 3
CROSS APPLY (SELECT CASE WHEN moment.said LIKE 'w%' THEN SUBSTRING(moment.said, 2, 128) ELSE moment.said END
            ) AS digits(said)
CROSS APPLY (SELECT CASE WHEN digits.said NOT LIKE '%[^0-9]%' AND LEN(digits.said) BETWEEN 1 AND 11
                         THEN CAST(digits.said AS bigint)
                    END) AS number(seconds)
WHERE moment.place = 0 AND moment.shortened = 0
  AND number.seconds IS NOT NULL;


-- The names. What a key is called is true, whoever says it: the names give the key.

DECLARE @names table (
    preimage    varchar(520)  COLLATE Latin1_General_BIN2 PRIMARY KEY,
    target      nvarchar(128) COLLATE Latin1_General_BIN2,
    step        nvarchar(128) COLLATE Latin1_General_BIN2,
    lock_key    bigint
);
DECLARE @preimage varchar(520), @statement nvarchar(600), @hash varbinary(32);

INSERT INTO @names (preimage, target, step)
SELECT l.preimage, MIN(l.target), MIN(l.step)
FROM @labels AS l
WHERE l.preimage IS NOT NULL
GROUP BY l.preimage;

SELECT @preimage = MIN(n.preimage) FROM @names AS n;
WHILE @preimage IS NOT NULL
BEGIN
    SET @statement = N'SET @hash = HASHBYTES(''SHA2_256'', 0x' + @preimage + N')';      -- hex digits only
    EXEC sys.sp_executesql @statement, N'@hash varbinary(32) OUTPUT', @hash = @hash OUTPUT;
    UPDATE @names SET lock_key = CAST(SUBSTRING(@hash, 1, 8) AS bigint) WHERE preimage = @preimage;
    SELECT @preimage = MIN(n.preimage) FROM @names AS n WHERE n.preimage > @preimage;
END;


-- The permits: who holds one holds the lock itself too, shared, whose names give the permit's key as well. The first free one is
-- taken, so that the first numbers explain most of what is held.

DECLARE @lock_key bigint, @permit_key bigint, @slot int;

SELECT @preimage = MIN(n.preimage) FROM @names AS n;
WHILE @preimage IS NOT NULL
BEGIN
    SELECT @lock_key = n.lock_key, @slot = 0 FROM @names AS n WHERE n.preimage = @preimage;
    WHILE @slot <= 998
          AND EXISTS (SELECT 1
                      FROM @requests AS l
                      JOIN @requests AS p ON p.session = l.session
                      WHERE l.lock_key = @lock_key AND l.in_queue = 0 AND l.holds = 1 AND l.mode = N'S' AND l.slot IS NULL
                        AND p.lock_key <> @lock_key AND p.in_queue = 0 AND p.holds = 1 AND p.mode = N'X' AND p.is_permit = 0)
    BEGIN
        -- The number's digits, each as its byte in hexadecimal: 42 is 3432.
        SET @statement = N'SET @hash = HASHBYTES(''SHA2_256'', 0x' + @preimage + N'1F'
            + CAST(CASE WHEN @slot < 10  THEN 30 + @slot
                        WHEN @slot < 100 THEN 3030 + @slot / 10 * 100 + @slot % 10
                        ELSE 303030 + @slot / 100 * 10000 + @slot / 10 % 10 * 100 + @slot % 10
                   END AS nvarchar(6)) + N')';
        EXEC sys.sp_executesql @statement, N'@hash varbinary(32) OUTPUT', @hash = @hash OUTPUT;
        SET @permit_key = CAST(SUBSTRING(@hash, 1, 8) AS bigint);

        UPDATE l
        SET slot = @slot
        FROM @requests AS l
        JOIN @requests AS p ON p.session = l.session
        WHERE l.lock_key = @lock_key AND l.in_queue = 0 AND l.holds = 1 AND l.mode = N'S' AND l.slot IS NULL
          AND p.lock_key = @permit_key AND p.in_queue = 0 AND p.holds = 1 AND p.mode = N'X' AND p.is_permit = 0;

        IF @@ROWCOUNT > 0
            UPDATE p
            SET is_permit = 1
            FROM @requests AS p
            JOIN @requests AS l ON l.session = p.session
            WHERE p.lock_key = @permit_key AND p.in_queue = 0 AND p.holds = 1 AND p.mode = N'X'
              AND l.lock_key = @lock_key AND l.slot = @slot;
        SET @slot = @slot + 1;
    END;
    SELECT @preimage = MIN(n.preimage) FROM @names AS n WHERE n.preimage > @preimage;
END;


-- The places: one row for each holder and for each who waits, numbered within each lock. Who has come to the head of the queue
-- for permits holds the queue, and now and then the lock, to look for a permit; who has one gives the queue back.

DECLARE @places table (
    lock        nvarchar(256) COLLATE Latin1_General_BIN2,
    number      int,
    session     int,
    lost        uniqueidentifier,
    lock_key    bigint,
    waiting     int,
    position    int,
    mode        nvarchar(60),
    waited_ms   bigint,
    PRIMARY KEY (lock, number)
);

INSERT INTO @places (lock, number, session, lost, lock_key, waiting, position, mode, waited_ms)
SELECT p.lock,
       ROW_NUMBER() OVER (PARTITION BY p.lock ORDER BY p.waiting, p.turn, p.waited_ms DESC, p.session, p.lost),
       p.session,
       p.lost,
       p.lock_key,
       p.waiting,
       CASE WHEN p.waiting = 1
            THEN ROW_NUMBER() OVER (PARTITION BY p.lock, p.waiting ORDER BY p.turn, p.waited_ms DESC, p.session, p.lost)
       END,
       CASE WHEN p.exclusive = 1 THEN N'exclusive'
            WHEN p.slot IS NOT NULL THEN N'slot ' + CAST(p.slot AS nvarchar(3))
            WHEN p.shared = 1 THEN N'shared'
            ELSE p.other
       END,
       p.waited_ms
FROM (SELECT COALESCE(CAST(r.lock_key AS nvarchar(20)), r.resource) AS lock,
             r.session, r.lost, r.lock_key, state.waiting,
             -- A conversion is served first, and the lock's own queue before that for permits.
             MIN(CASE WHEN state.waiting = 0 THEN 0
                      WHEN r.in_queue = 0 THEN 1 - r.holds
                      ELSE 3 - r.holds
                 END) AS turn,
             MAX(ISNULL(r.waited_ms, 0)) AS waited_ms,
             MAX(CASE WHEN seen.mode = N'X' THEN 1 ELSE 0 END) AS exclusive,
             MAX(CASE WHEN seen.mode = N'S' THEN 1 ELSE 0 END) AS shared,
             MAX(CASE WHEN state.waiting = 0 THEN r.slot END) AS slot,
             NULLIF(MAX(ISNULL(seen.mode, N'')), N'') AS other
      FROM @requests AS r
      CROSS JOIN (VALUES (0), (1)) AS state(waiting)
      CROSS APPLY (SELECT CASE WHEN r.in_queue = 1 THEN N'S'
                               WHEN state.waiting = 1 OR r.waits = 0 THEN r.mode
                          END) AS seen(mode)
      WHERE state.waiting = 1 AND (r.waits = 1 OR r.in_queue = 1)
         OR state.waiting = 0 AND r.holds = 1 AND r.in_queue = 0 AND r.is_permit = 0
            AND NOT EXISTS (SELECT 1 FROM @requests AS head
                            WHERE head.session = r.session AND head.lock_key = r.lock_key
                              AND head.in_queue = 1 AND head.holds = 1)
      GROUP BY COALESCE(CAST(r.lock_key AS nvarchar(20)), r.resource), r.session, r.lost, r.lock_key, state.waiting) AS p
OPTION (RECOMPILE);         -- with the number of rows that the tables have, not the one that the server guesses


-- The texts that other sessions say of themselves and of their locks.

DECLARE @texts table (
    said        nvarchar(256) COLLATE Latin1_General_BIN2 PRIMARY KEY,
    shown       nvarchar(256) COLLATE Latin1_General_BIN2
);
DECLARE @position int;

INSERT INTO @texts (said, shown)
SELECT t.said, t.said
FROM (SELECT s.host FROM @sessions AS s
      UNION SELECT s.login FROM @sessions AS s
      UNION SELECT s.program FROM @sessions AS s
      UNION SELECT p.lock FROM @places AS p WHERE p.lock_key IS NULL) AS t(said)
WHERE t.said IS NOT NULL;

SELECT @position = MAX(LEN(t.said)) FROM @texts AS t;
WHILE @position > 0
BEGIN
    UPDATE t
    SET shown = STUFF(t.shown, @position, 1, N'?')
    FROM @texts AS t
    JOIN @hidden AS h ON UNICODE(SUBSTRING(t.shown, @position, 1)) BETWEEN h.low AND h.high
    WHERE @position <= LEN(t.shown);
    SET @position = @position - 1;
END;


-- The answer.

WITH
-- For each place the pids before it, between commas.
line AS (
    SELECT p.lock, p.number, pid.text, CAST(',' AS varchar(max)) AS ahead
    FROM @places AS p
    CROSS APPLY (SELECT CAST(CASE WHEN p.session > 0 THEN p.session ELSE 0 END AS varchar(11)) + ',') AS pid(text)
    WHERE p.number = 1
  UNION ALL
    SELECT p.lock, p.number, pid.text,
           CAST(line.ahead + CASE WHEN line.ahead LIKE '%,' + line.text + '%' THEN '' ELSE line.text END AS varchar(max))
    FROM line
    JOIN @places AS p ON p.lock = line.lock AND p.number = line.number + 1
    CROSS APPLY (SELECT CAST(CASE WHEN p.session > 0 THEN p.session ELSE 0 END AS varchar(11)) + ',') AS pid(text)
),

described AS (
    SELECT p.lock, p.number, p.session, p.lost, p.lock_key, p.waiting, p.position, p.mode,
           COALESCE(name.target, CASE WHEN label.session IS NOT NULL THEN label.target + label.target_cut END) AS target,
           COALESCE(name.step,   CASE WHEN label.session IS NOT NULL THEN label.step   + label.step_cut   END) AS step,
           label.tenant,
           CASE WHEN label.session IS NOT NULL THEN CASE WHEN label.since <= @now THEN label.since END
                WHEN p.waiting = 1 THEN DATEADD(second, -p.waited_ms / 1000, @now)
           END AS since
    FROM (SELECT q.*,
                 SUM(CASE WHEN q.lock_key IS NOT NULL THEN 1 ELSE 0 END) OVER (PARTITION BY q.session, q.waiting) AS alike
          FROM @places AS q) AS p
    OUTER APPLY (SELECT TOP (1) n.target, n.step
                 FROM @names AS n
                 WHERE n.lock_key = p.lock_key
                 ORDER BY n.preimage) AS name
    -- The label of this place: of a session with several locks it is that of the last. A shortened one cannot be proved: it is
    -- taken where it can mean no other lock, and says nothing that is known to be false.
    LEFT JOIN (SELECT l.*, n.lock_key
               FROM @labels AS l
               LEFT JOIN @names AS n ON n.preimage = l.preimage) AS label
           ON label.session = p.session AND label.waiting = p.waiting
          AND (label.lock_key = p.lock_key
               OR label.preimage IS NULL AND p.lock_key IS NOT NULL AND p.alike = 1
                  AND label.target = LEFT(COALESCE(name.target, label.target), LEN(label.target))
                  AND label.step   = LEFT(COALESCE(name.step,   label.step),   LEN(label.step)))
)

SELECT CASE WHEN d.waiting = 1 THEN N'waiting' ELSE N'held' END AS state,
       CAST(d.position AS bigint) AS position,
       REPLACE(d.target, N'##', N'#%23') AS target,
       REPLACE(d.step,   N'##', N'#%23') AS step,
       REPLACE(d.tenant, N'##', N'#%23') AS tenant,
       CAST(d.since AS datetimeoffset(0)) AS since,
       DATEDIFF_BIG(second, d.since, @now) AS seconds,
       CASE WHEN d.session > 0 THEN d.session END AS pid,
       REPLACE(host.shown,  N'##', N'#?') AS host,
       REPLACE(login.shown, N'##', N'#?') AS [user],
       CASE WHEN d.waiting = 1 THEN NULL
            WHEN d.session > 0 THEN N'KILL ' + CAST(d.session AS nvarchar(11))
            WHEN d.lost IS NOT NULL THEN N'KILL ''' + CAST(d.lost AS nvarchar(36)) + N''''
       END AS to_free,
       d.mode,
       d.lock_key AS [key],
       CASE WHEN d.lock_key IS NULL THEN N'application lock ' + REPLACE(elsewhere.shown, N'##', N'#?')
            WHEN d.target IS NOT NULL THEN N'dblock'
            ELSE N'dblock, names unknown'
       END AS lock,
       CASE WHEN d.lost IS NOT NULL THEN N'distributed transaction ' + CAST(d.lost AS nvarchar(36))
            ELSE REPLACE(program.shown, N'##', N'#?')
       END AS application,
       CASE WHEN d.waiting = 1
            THEN NULLIF(REPLACE(LTRIM(RTRIM(REPLACE(
                     REPLACE(line.ahead, ',' + CAST(d.session AS varchar(11)) + ',', ','), ',', ' '))), ' ', ','), '')
       END AS blocked_by
FROM described AS d
JOIN line ON line.lock = d.lock AND line.number = d.number
LEFT JOIN @sessions AS s      ON s.session = d.session
LEFT JOIN @texts AS host      ON host.said = s.host
LEFT JOIN @texts AS login     ON login.said = s.login
LEFT JOIN @texts AS program   ON program.said = s.program
LEFT JOIN @texts AS elsewhere ON elsewhere.said = d.lock AND d.lock_key IS NULL
ORDER BY MAX(d.waiting) OVER (PARTITION BY d.lock) DESC,
         MIN(CASE WHEN d.waiting = 1 AND d.since IS NOT NULL THEN d.since ELSE '9999-12-31' END) OVER (PARTITION BY d.lock),
         MIN(COALESCE(d.since, '9999-12-31')) OVER (PARTITION BY d.lock),
         d.lock,
         d.number
OPTION (MAXRECURSION 0, RECOMPILE);

IF @counting = 1 SET NOCOUNT OFF;
