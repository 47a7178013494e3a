/*
dblock acquire, for SQL Server 2016 and later, and Azure SQL

Takes the lock for one step on one target, for this session, and waits for it in the server's own queue, as dblock's other
doors (Python, `dblock run`) do. What the session runs after it, up to release.sql, runs for one tenant at a time on each
target. Nothing is created in the database.

Needs       a login, no other rights. To be told who holds the lock: VIEW SERVER STATE (from 2022 on VIEW SERVER
            PERFORMANCE STATE, in Azure SQL Database VIEW DATABASE STATE).
            Autocommit: not inside a transaction, nor with IMPLICIT_TRANSACTIONS; but see dblock.scope.
            A batch of its own, sent as text: not by sp_executesql, as drivers do it with parameters, nor in a procedure,
            nor between the caller's BEGIN TRY and END TRY, where the session cannot be closed.

Settings    read from the session's context, and cleared by this script whatever comes of it; empty means absent. Write
            N'...', since the server changes letters that its code page does not have in '...', and tells nobody
    dblock.target, dblock.step    the names of the lock; required
    dblock.tenant                 for whom: a label that those who wait, and inspect.sql, show
    dblock.timeout                seconds to wait, such as 600 or 0.5; 0: do not wait; absent: without limit
    dblock.database               the database this must be
    dblock.key                    the key this must be, as `dblock key` or key.sql computes it
    dblock.shared                 on: beside others who say so or have a slot; off or absent: beside nobody
    dblock.slots                  1 to 999: so many beside each other, each with a number of its own from 0 on. It is left in
                                  the session's context: CAST(SESSION_CONTEXT(N'dblock.slot') AS int)
    dblock.scope                  session or absent: until release.sql. transaction: until COMMIT or ROLLBACK

            EXEC sp_set_session_context N'dblock.target', N'web-01';
            EXEC sp_set_session_context N'dblock.step', N'b';
            EXEC sp_set_session_context N'dblock.timeout', N'600';

Those lines as wishes.sql, then acquire.sql, the step b.sql, and release.sql, all on one connection. Mind the runner's own
limit for a command, which is 30 seconds in most of them: it must be longer than the wait, best without limit.

sqlcmd          sqlcmd -b -f 65001 -S server -d shared -i wishes.sql,acquire.sql,b.sql,release.sql
                -f says that the files are UTF-8; -t is the limit: leave it out, or -t 0
Invoke-Sqlcmd   Invoke-Sqlcmd -ServerInstance server -Database shared -AbortOnError -Query ((Get-Content -Raw -Encoding UTF8
                    wishes.sql, acquire.sql, b.sql, release.sql) -join "`nGO`n")
                all in one call; -QueryTimeout is the limit: leave it out, or 65535
SSMS            the four texts in one window, a line GO between them; Query Options, Execution time-out: 0
Octopus Deploy and other steps that run SQL: the four texts as one script, a line GO between them; the command timeout of the
                step's template: 0. A ' in a name must be doubled, which text substitution does not do
DbUp            four scripts run in this order, always (ScriptType.RunAlways), without transaction;
                .WithExecutionTimeout(TimeSpan.Zero)
SqlClient, ODBC, pymssql and others: each text a command of its own, without parameters, on one connection in autocommit;
                CommandTimeout = 0, and ConnectRetryCount=0 in the connection string

With dblock.scope = transaction: BEGIN TRANSACTION, then acquire.sql, the step, release.sql, which only looks whether the lock
is held to the end, and COMMIT. After a failure: release.sql, then ROLLBACK. Not under SNAPSHOT isolation, which may go on seeing
the data as they were before the lock was granted.

If it fails it raises error 50000 (severity 16, state as below), whose message begins with one of these:
    51001   1   not acquired in time; the message says who holds it since when
    51002   2   chosen as the victim of a deadlock
    51003   3   a name or setting is not acceptable
    51005   5   no lock could be trusted here: a transaction, or none for dblock.scope = transaction; sp_executesql; a read-only
                database; another database
    51006   6   this session holds the lock already
    51007   7   the server refused or cancelled the call
AND CLOSES THE SESSION (SET NOEXEC ON; Babelfish: SET PARSEONLY ON): every later batch is compiled but not executed, silently,
until release.sql or the next acquire.sql. Also the batch that sets the wishes: to try again in this session run release.sql
first, or begin that batch with SET NOEXEC OFF; SET PARSEONLY OFF;

What nothing on the server can stop, so that only the runner's stop at the first error (sqlcmd -b) can:
    a command timeout, or Cancel in SSMS, cuts this script off in the middle: the session is open, without the lock.
    release.sql then says so, with 51004
    a client that reconnects by itself goes on in a NEW session, which is open, without the lock: ConnectRetryCount=0. Those of
    Microsoft do not while a lock is held, says their documentation, but may after an acquire.sql that failed
    a step which itself says SET NOEXEC OFF opens the session again: what follows there runs without the lock

The lock lasts until release.sql or the end of the session; a pool (SqlClient: Pooling=false) can keep that after Close(). It
is a lock of this database, and excludes nobody who works in another one: let all callers agree on dblock.database. Several
locks in one session: in ascending order of their keys, given back in reverse. How locks are shown: inspect.sql.
*/
SET NOEXEC OFF;
SET PARSEONLY OFF;

DECLARE
    -- The wishes. Types as the session's context has them.
    @dblock_target            nvarchar(4000),
    @dblock_step              nvarchar(4000),
    @dblock_tenant            nvarchar(4000),
    @dblock_timeout           nvarchar(4000),
    @dblock_shared            nvarchar(4000),
    @dblock_slots             nvarchar(4000),
    @dblock_scope             nvarchar(4000),
    @dblock_database          nvarchar(4000),
    @dblock_wished_key        nvarchar(4000),
    @dblock_target_type       nvarchar(128),
    @dblock_step_type         nvarchar(128),
    @dblock_database_type     nvarchar(128),

    -- The session. dblock.held lists the locks that this script took, the last one first, each as
    -- `owner database key permit slot before;`: S for the session or T for the transaction; the database's number; the keys of
    -- the lock and of its permit; dblock.slot and, in hexadecimal, context_info as they were before. What there is not is a -.
    -- dblock.waiting is such an entry too, there only during the wait: one that is left was cut off. dblock.failed counts the
    -- failures that no release.sql has answered yet.
    @dblock_held              varchar(8000),
    @dblock_entry             varchar(8000),
    @dblock_list              varchar(8000),      -- the same with this lock
    @dblock_waiting           varchar(8000),
    @dblock_failed            int,
    @dblock_before            varbinary(128),
    @dblock_slot_before       varchar(10),
    @dblock_babelfish         bit = CASE WHEN SERVERPROPERTY('Babelfish') IS NULL THEN 0 ELSE 1 END,

    -- Names: one after the other, character by character.
    @dblock_field             int,
    @dblock_name              nvarchar(10),
    @dblock_text              nvarchar(4000),
    @dblock_type              nvarchar(128),
    @dblock_flaw              nvarchar(200),
    @dblock_place             int,
    @dblock_code              int,
    @dblock_low               int,
    @dblock_byte              int,
    @dblock_following         int,
    @dblock_bytes             int,
    @dblock_digits            varchar(2),
    @dblock_hex               varchar(600),
    @dblock_target_hex        varchar(600),
    @dblock_step_hex          varchar(600),

    -- The lock; with slots also its permits, and the queue of those who want one.
    @dblock_sql               nvarchar(4000),
    @dblock_hash              varbinary(32),
    @dblock_key               bigint,
    @dblock_resource          nvarchar(255),
    @dblock_mode              nvarchar(32) = N'Exclusive',
    @dblock_owner             nvarchar(32) = N'Session',
    @dblock_isolation         int,                -- of the transaction; 5 is SNAPSHOT
    @dblock_queue             nvarchar(255),
    @dblock_permit            nvarchar(255),
    @dblock_permits           int = 0,            -- how many there are
    @dblock_permit_keys       varchar(max) = '',  -- as far as they were needed, 20 characters each
    @dblock_slot              int,
    @dblock_slot_said         nvarchar(3),

    -- The wait. What comes next: queue, look (for a permit), nap, lock, permit, held.
    @dblock_next              nvarchar(10),
    @dblock_asked_resource    nvarchar(255),
    @dblock_asked_mode        nvarchar(32),
    @dblock_asked_owner       nvarchar(32),
    @dblock_asked_free        int,
    @dblock_seconds           nvarchar(4000),
    @dblock_fraction          nvarchar(4000),
    @dblock_milliseconds      int = -1,           -- without limit
    @dblock_left              int,
    @dblock_nap               int = 1,
    @dblock_began             datetime2,
    @dblock_waited            bigint,
    @dblock_result            int,
    @dblock_told              bit = 0,
    @dblock_asked             bit = 0,
    @dblock_stuck             int = 0,            -- how many of them could not be given back
    @dblock_granted           bit = 0,

    -- The label: its fields percent-encoded, then fitted into what room there is.
    @dblock_encoded           varchar(600),
    @dblock_target_encoded    varchar(600),
    @dblock_step_encoded      varchar(600),
    @dblock_tenant_encoded    varchar(600),
    @dblock_target_fitted     varchar(600),
    @dblock_step_fitted       varchar(600),
    @dblock_tenant_fitted     varchar(600),
    @dblock_target_mark       varchar(1),
    @dblock_step_mark         varchar(1),
    @dblock_tenant_mark       varchar(1),
    @dblock_time_width        int,
    @dblock_fields            varchar(128),
    @dblock_waiting_fields    varchar(128),
    @dblock_holding_fields    varchar(128),
    @dblock_label             varbinary(128),

    -- Who is in the way.
    @dblock_holder            int,
    @dblock_host              nvarchar(128),
    @dblock_holder_label      varbinary(128),
    @dblock_others            int,
    @dblock_ahead             int,
    @dblock_visible           bit,
    @dblock_bracketed         nvarchar(300),      -- as the resource stands in the description of a lock
    @dblock_queue_bracketed   nvarchar(300),
    @dblock_said              varchar(128),
    @dblock_word              varchar(128),
    @dblock_said_time         varchar(128),
    @dblock_said_tenant       varchar(128),
    @dblock_said_target       varchar(128),
    @dblock_said_step         varchar(128),
    @dblock_since             datetime2(0),
    @dblock_obstacle          nvarchar(1000),

    -- How it ends. Only CONCAT makes texts of it: one part that is NULL must not make a failure disappear.
    @dblock_failure           nvarchar(2000),
    @dblock_error             int,
    @dblock_state             int;

BEGIN TRY
    SELECT
        @dblock_target        = ISNULL(CAST(SESSION_CONTEXT(N'dblock.target')   AS nvarchar(4000)), N''),
        @dblock_step          = ISNULL(CAST(SESSION_CONTEXT(N'dblock.step')     AS nvarchar(4000)), N''),
        @dblock_tenant        = ISNULL(CAST(SESSION_CONTEXT(N'dblock.tenant')   AS nvarchar(4000)), N''),
        @dblock_timeout       = ISNULL(CAST(SESSION_CONTEXT(N'dblock.timeout')  AS nvarchar(4000)), N''),
        @dblock_shared        = ISNULL(CAST(SESSION_CONTEXT(N'dblock.shared')   AS nvarchar(4000)), N''),
        @dblock_slots         = ISNULL(CAST(SESSION_CONTEXT(N'dblock.slots')    AS nvarchar(4000)), N''),
        @dblock_scope         = ISNULL(CAST(SESSION_CONTEXT(N'dblock.scope')    AS nvarchar(4000)), N''),
        @dblock_database      = ISNULL(CAST(SESSION_CONTEXT(N'dblock.database') AS nvarchar(4000)), N''),
        @dblock_wished_key    = ISNULL(CAST(SESSION_CONTEXT(N'dblock.key')      AS nvarchar(4000)), N''),
        @dblock_target_type   = CAST(SQL_VARIANT_PROPERTY(SESSION_CONTEXT(N'dblock.target'),   'BaseType') AS nvarchar(128)),
        @dblock_step_type     = CAST(SQL_VARIANT_PROPERTY(SESSION_CONTEXT(N'dblock.step'),     'BaseType') AS nvarchar(128)),
        @dblock_database_type = CAST(SQL_VARIANT_PROPERTY(SESSION_CONTEXT(N'dblock.database'), 'BaseType') AS nvarchar(128)),
        @dblock_held          = ISNULL(CAST(SESSION_CONTEXT(N'dblock.held')     AS varchar(8000)), ''),
        @dblock_waiting       = ISNULL(CAST(SESSION_CONTEXT(N'dblock.waiting')  AS varchar(8000)), ''),
        @dblock_failed        = ISNULL(TRY_CAST(CAST(SESSION_CONTEXT(N'dblock.failed') AS nvarchar(20)) AS int), 0),
        @dblock_before        = ISNULL(CONTEXT_INFO(), 0x),
        @dblock_slot_before   = ISNULL(CAST(TRY_CAST(NULLIF(CAST(SESSION_CONTEXT(N'dblock.slot') AS nvarchar(20)), N'')
                                                     AS smallint) AS varchar(10)), '-');

    -- A failure until the lock is held, and taken back then. Where an earlier one is unanswered and there are no wishes, their
    -- batch was skipped: this is an inner lock, which has a release.sql of its own to come. With wishes it is a retry.
    SET @dblock_failed = @dblock_failed + CASE
        WHEN @dblock_failed = 0 THEN 1
        WHEN DATALENGTH(@dblock_target) = 0 AND DATALENGTH(@dblock_step) = 0 THEN 1
        ELSE 0 END;
    EXEC sys.sp_set_session_context N'dblock.failed', @dblock_failed;

    EXEC sys.sp_set_session_context N'dblock.target', NULL;
    EXEC sys.sp_set_session_context N'dblock.step', NULL;
    EXEC sys.sp_set_session_context N'dblock.tenant', NULL;
    EXEC sys.sp_set_session_context N'dblock.timeout', NULL;
    EXEC sys.sp_set_session_context N'dblock.shared', NULL;
    EXEC sys.sp_set_session_context N'dblock.slots', NULL;
    EXEC sys.sp_set_session_context N'dblock.scope', NULL;
    EXEC sys.sp_set_session_context N'dblock.database', NULL;
    EXEC sys.sp_set_session_context N'dblock.key', NULL;

    -- Judge ------------------------------------------------------------------------------------------------------------
    -- Names by integers, everything else under a binary collation and with a | at the end: the server's `=` folds and
    -- ignores trailing spaces.

    SET @dblock_error = 51003;
    SET @dblock_field = 1;
    WHILE @dblock_field <= 3
    BEGIN
        SELECT
            @dblock_name    = CASE @dblock_field WHEN 1 THEN N'target' WHEN 2 THEN N'step' ELSE N'tenant' END,
            @dblock_text    = CASE @dblock_field WHEN 1 THEN @dblock_target WHEN 2 THEN @dblock_step ELSE @dblock_tenant END,
            @dblock_type    = CASE @dblock_field WHEN 1 THEN @dblock_target_type ELSE @dblock_step_type END,
            @dblock_flaw    = NULL,
            @dblock_place   = 1,
            @dblock_code    = 0,
            @dblock_bytes   = 0,
            @dblock_hex     = '',
            @dblock_encoded = '';

        -- In UTF-8, as far as names may be long. A binary collation gives the code units one by one.
        WHILE @dblock_bytes <= 255
              AND DATALENGTH(SUBSTRING(@dblock_text COLLATE Latin1_General_BIN2, @dblock_place, 1)) > 0
        BEGIN
            SET @dblock_code = UNICODE(SUBSTRING(@dblock_text COLLATE Latin1_General_BIN2, @dblock_place, 1));
            SET @dblock_place = @dblock_place + 1;
            IF @dblock_code BETWEEN 55296 AND 57343
            BEGIN
                SET @dblock_low = UNICODE(SUBSTRING(@dblock_text COLLATE Latin1_General_BIN2, @dblock_place, 1));
                IF @dblock_code < 56320 AND @dblock_low BETWEEN 56320 AND 57343
                    SELECT @dblock_code  = 65536 + (@dblock_code - 55296) * 1024 + @dblock_low - 56320,
                           @dblock_place = @dblock_place + 1;
                ELSE
                    SELECT @dblock_flaw = ISNULL(@dblock_flaw, N' holds a lone surrogate'),
                           @dblock_code = 63;     -- in a tenant: a question mark
            END;
            IF @dblock_code < 32 OR @dblock_code = 127
                SET @dblock_flaw = ISNULL(@dblock_flaw, N' holds a control character');
            IF @dblock_code = 32 AND @dblock_bytes = 0
                SET @dblock_flaw = ISNULL(@dblock_flaw, N' begins or ends with a space');

            SET @dblock_following = CASE WHEN @dblock_code < 128   THEN 0
                                         WHEN @dblock_code < 2048  THEN 1
                                         WHEN @dblock_code < 65536 THEN 2
                                         ELSE 3 END;
            SET @dblock_byte = CASE @dblock_following WHEN 0 THEN @dblock_code
                                                      WHEN 1 THEN 192 + @dblock_code / 64
                                                      WHEN 2 THEN 224 + @dblock_code / 4096
                                                      ELSE        240 + @dblock_code / 262144 END;
            WHILE @dblock_following >= 0
            BEGIN
                SET @dblock_digits = SUBSTRING('0123456789ABCDEF', @dblock_byte / 16 + 1, 1)
                                   + SUBSTRING('0123456789ABCDEF', @dblock_byte % 16 + 1, 1);
                SET @dblock_hex = @dblock_hex + @dblock_digits;
                IF @dblock_bytes < 128            -- more than that is no part of any label
                    SET @dblock_encoded = @dblock_encoded + CASE
                        WHEN @dblock_byte BETWEEN 48 AND 57 OR @dblock_byte BETWEEN 65 AND 90
                             OR @dblock_byte BETWEEN 97 AND 122 OR @dblock_byte IN (45, 46, 95)
                        THEN CHAR(@dblock_byte)
                        ELSE '%' + @dblock_digits END;
                SET @dblock_bytes = @dblock_bytes + 1;
                SET @dblock_following = @dblock_following - 1;
                SET @dblock_byte = 128
                    + @dblock_code / CASE @dblock_following WHEN 2 THEN 4096 WHEN 1 THEN 64 ELSE 1 END % 64;
            END;
        END;

        IF @dblock_failure IS NULL AND @dblock_field < 3
            SET @dblock_flaw = CASE
                WHEN DATALENGTH(@dblock_text) = 0
                    THEN CONCAT(N' is not set', CASE WHEN @dblock_failed > 1 THEN
                         N': the batch with the wishes was skipped, since an acquire.sql before failed; run release.sql' END)
                WHEN @dblock_type COLLATE Latin1_General_BIN2 <> N'nvarchar'
                    THEN CONCAT(N' is ', @dblock_type, N', in which the server may have changed letters; write N''...''')
                WHEN @dblock_bytes > 255
                    THEN N' has more than 255 bytes in UTF-8'
                WHEN @dblock_flaw IS NULL AND @dblock_code = 32
                    THEN N' begins or ends with a space'
                ELSE @dblock_flaw END;
        IF @dblock_failure IS NULL AND @dblock_field < 3 AND @dblock_flaw IS NOT NULL
            SET @dblock_failure = CONCAT(N'dblock.', @dblock_name, @dblock_flaw);

        SET @dblock_encoded = CASE @dblock_encoded WHEN '' THEN '-' WHEN '-' THEN '%2D' ELSE @dblock_encoded END;
        IF @dblock_field = 1
            SELECT @dblock_target_hex = @dblock_hex, @dblock_target_encoded = @dblock_encoded;
        ELSE IF @dblock_field = 2
            SELECT @dblock_step_hex = @dblock_hex, @dblock_step_encoded = @dblock_encoded;
        ELSE
            SET @dblock_tenant_encoded = @dblock_encoded;
        SET @dblock_field = @dblock_field + 1;
    END;

    IF @dblock_failure IS NULL
    BEGIN
        -- Nothing but hexadecimal digits reaches the statement.
        SET @dblock_sql = CONCAT(N'SET @hash = HASHBYTES(''SHA2_256'', 0x', @dblock_target_hex, N'1F', @dblock_step_hex, N')');
        EXEC sys.sp_executesql @dblock_sql, N'@hash varbinary(32) OUTPUT', @hash = @dblock_hash OUTPUT;
        SET @dblock_key = CAST(SUBSTRING(@dblock_hash, 1, 8) AS bigint);
        SET @dblock_resource = CONCAT(N'dblock:', @dblock_key);
        IF @dblock_key IS NULL
            SELECT @dblock_failure = N'the server could not compute the key', @dblock_error = 51007;
    END;

    IF @dblock_failure IS NULL
    BEGIN
        SET @dblock_place = CHARINDEX(N'.', LEFT(@dblock_timeout, 100) + N'.' COLLATE Latin1_General_BIN2);
        SET @dblock_seconds = LEFT(@dblock_timeout, @dblock_place - 1);
        SET @dblock_fraction = SUBSTRING(@dblock_timeout, @dblock_place, 4000);
        SET @dblock_failure = CASE
            WHEN DATALENGTH(@dblock_timeout) > 0
                 AND (@dblock_timeout COLLATE Latin1_General_BIN2 LIKE N'%[^0-9.]%'
                      OR LEN(@dblock_seconds) NOT BETWEEN 1 AND 7
                      OR LEN(@dblock_fraction) NOT IN (0, 2, 3, 4)
                      OR CHARINDEX(N'.', @dblock_fraction, 2) > 0)
                THEN CONCAT(N'dblock.timeout is no number of seconds like 600 or 0.5: ''', LEFT(@dblock_timeout, 100), N'''')
            WHEN DATALENGTH(@dblock_timeout) > 0 AND CAST(@dblock_timeout AS decimal(10, 3)) > 2147483
                THEN CONCAT(N'dblock.timeout is more than 2147483 seconds: ', @dblock_timeout)
            WHEN @dblock_shared + N'|' COLLATE Latin1_General_BIN2 NOT IN (N'|', N'on|', N'off|')
                THEN CONCAT(N'dblock.shared is neither on nor off: ''', LEFT(@dblock_shared, 100), N'''')
            WHEN DATALENGTH(@dblock_slots) > 0
                 AND @dblock_slots + N'|' COLLATE Latin1_General_BIN2 NOT LIKE N'[1-9]|'
                 AND @dblock_slots + N'|' COLLATE Latin1_General_BIN2 NOT LIKE N'[1-9][0-9]|'
                 AND @dblock_slots + N'|' COLLATE Latin1_General_BIN2 NOT LIKE N'[1-9][0-9][0-9]|'
                THEN CONCAT(N'dblock.slots is no number from 1 to 999: ''', LEFT(@dblock_slots, 100), N'''')
            WHEN DATALENGTH(@dblock_slots) > 0 AND @dblock_shared = N'on'
                THEN N'dblock.slots and dblock.shared=on exclude each other'
            WHEN @dblock_scope + N'|' COLLATE Latin1_General_BIN2 NOT IN (N'|', N'session|', N'transaction|')
                THEN CONCAT(N'dblock.scope is neither session nor transaction: ''', LEFT(@dblock_scope, 100), N'''')
            WHEN @dblock_wished_key + N'|' COLLATE Latin1_General_BIN2 NOT IN (N'|', CONCAT(@dblock_key, N'|'))
                THEN CONCAT(N'dblock.key is ''', LEFT(@dblock_wished_key, 100), N''', but these names have the key ',
                            @dblock_key)
            WHEN DATALENGTH(@dblock_database) > 0 AND @dblock_database_type COLLATE Latin1_General_BIN2 <> N'nvarchar'
                THEN CONCAT(N'dblock.database is ', @dblock_database_type, N', in which the server may have changed letters;',
                            N' write N''...''')
            END;
    END;

    IF @dblock_failure IS NULL
    BEGIN
        IF @dblock_scope = N'transaction'
        BEGIN
            SET @dblock_owner = N'Transaction';
            IF @@TRANCOUNT > 0                -- or IMPLICIT_TRANSACTIONS would open one here
                SELECT @dblock_isolation = s.transaction_isolation_level
                FROM sys.dm_exec_sessions AS s
                WHERE s.session_id = @@SPID;
        END;
        IF @dblock_shared = N'on'
            SET @dblock_mode = N'Shared';
        IF DATALENGTH(@dblock_slots) > 0
            SELECT @dblock_mode = N'Shared', @dblock_permits = CAST(@dblock_slots AS int),
                   @dblock_queue = @dblock_resource + N'q', @dblock_queue_bracketed = CONCAT(N'[', @dblock_resource, N'q]');
        SET @dblock_bracketed = CONCAT(N'[', @dblock_resource, N']');

        SET @dblock_error = 51005;
        SET @dblock_failure = CASE
            WHEN @@NESTLEVEL > 0
                THEN N'inside sp_executesql, EXECUTE or a procedure a failure could not close the session; send acquire.sql as a'
                   + N' batch of its own, without parameters'
            WHEN @dblock_owner = N'Transaction' AND @@TRANCOUNT = 0
                THEN N'dblock.scope is transaction, but there is none: the lock would end at once; BEGIN TRANSACTION first'
            WHEN @dblock_owner = N'Transaction' AND XACT_STATE() <> 1
                THEN N'this transaction can only be rolled back'
            WHEN @dblock_owner = N'Transaction' AND ISNULL(@dblock_isolation, 5) = 5
                THEN N'under SNAPSHOT isolation the step may see the data as they were before the lock was granted; use another'
            WHEN @dblock_owner = N'Session' AND @@TRANCOUNT > 0
                THEN N'inside a transaction the lock would be given back before the work is committed; send acquire.sql, the'
                   + N' step and release.sql in autocommit, or set dblock.scope to transaction'
            WHEN @dblock_owner = N'Session' AND @@OPTIONS & 2 = 2
                THEN N'with IMPLICIT_TRANSACTIONS the lock would be given back before the work is committed; use autocommit'
            WHEN @dblock_waiting <> ''
                THEN N'the acquire.sql before this one was cut off in the middle (a command timeout, a cancel), and may have'
                   + N' left its lock; run release.sql first'
            WHEN ISNULL(CAST(DATABASEPROPERTYEX(DB_NAME(), 'Updateability') AS nvarchar(128)), N'')
                 COLLATE Latin1_General_BIN2 <> N'READ_WRITE'
                THEN CONCAT(N'database ', QUOTENAME(DB_NAME()), N' is read-only here, as on a secondary, whose locks exclude',
                            N' nobody on the primary; connect to the primary')
            WHEN @dblock_database + N'|' COLLATE Latin1_General_BIN2 NOT IN (N'|', CONCAT(DB_NAME(), N'|'))
                THEN CONCAT(N'connected to database ', QUOTENAME(DB_NAME()), N', but dblock.database asks for ',
                            QUOTENAME(LEFT(@dblock_database, 128)), N': callers in two databases do not exclude each other')
            WHEN LEN(@dblock_held) > 7600
                THEN N'this session holds more locks than dblock.held can list; give some back'
            END;
    END;

    IF @dblock_failure IS NULL
    BEGIN
        -- A transaction that has ended has taken its locks with it. Their entries are the first ones, since inside a transaction
        -- only it takes locks; what was before them was before this lock.
        WHILE @dblock_failure IS NULL
        BEGIN
            SET @dblock_entry = LEFT(@dblock_held, CHARINDEX(';', @dblock_held));
            IF @dblock_entry COLLATE Latin1_General_BIN2 NOT LIKE 'T [0-9]% %[0-9] [-0-9]% [-0-9]% %;'
               OR @dblock_entry COLLATE Latin1_General_BIN2 LIKE 'T%[^-0-9A-F ;]%'
                BREAK;
            SET @dblock_place = CHARINDEX(' ', @dblock_entry, 3);
            SET @dblock_asked_resource = CONCAT(N'dblock:', SUBSTRING(
                @dblock_entry, @dblock_place + 1, CHARINDEX(' ', @dblock_entry, @dblock_place + 1) - @dblock_place - 1));
            IF @@TRANCOUNT > 0
               AND (SUBSTRING(@dblock_entry, 3, @dblock_place - 3) <> CAST(DB_ID() AS varchar(11))
                    OR CASE WHEN @@TRANCOUNT > 0 THEN APPLOCK_MODE('public', @dblock_asked_resource, 'Transaction') END
                       <> N'NoLock')
                BREAK;
            -- The last two of six fields.
            SET @dblock_place = LEN(@dblock_entry) - CHARINDEX(' ', REVERSE(@dblock_entry)) + 1;
            SET @dblock_sql = CONCAT(N'SET @before = 0x', REPLACE(SUBSTRING(@dblock_entry, @dblock_place + 1, 257), ';', ''));
            EXEC sys.sp_executesql @dblock_sql, N'@before varbinary(128) OUTPUT', @before = @dblock_before OUTPUT;
            SET @dblock_entry = LEFT(@dblock_entry, @dblock_place - 1);
            SET @dblock_slot_before = RIGHT(@dblock_entry, CHARINDEX(' ', REVERSE(@dblock_entry)) - 1);
            SET @dblock_held = SUBSTRING(@dblock_held, CHARINDEX(';', @dblock_held) + 1, 8000);
        END;

        SET @dblock_error = 51006;
        IF ISNULL(APPLOCK_MODE('public', @dblock_resource, 'Session'), N'') <> N'NoLock'
           OR CASE WHEN @@TRANCOUNT > 0 THEN ISNULL(APPLOCK_MODE('public', @dblock_resource, 'Transaction'), N'')
                   ELSE N'NoLock' END <> N'NoLock'
            SET @dblock_failure = CONCAT(N'this session (', @@SPID, N') holds this lock already; a lock is never taken twice');
    END;

    IF @dblock_failure IS NULL
    BEGIN
        IF DATALENGTH(@dblock_timeout) > 0
            SET @dblock_milliseconds = CAST(CAST(@dblock_timeout AS decimal(10, 3)) * 1000 AS int);
        IF @dblock_milliseconds = 0
            SET @dblock_milliseconds = 1;

        -- The label has 128 bytes. The time takes 10 digits, and a w before them while waiting.
        SET @dblock_time_width = 10;
        WHILE @dblock_time_width <= 11
        BEGIN
            SELECT @dblock_target_fitted = @dblock_target_encoded, @dblock_target_mark = '',
                   @dblock_step_fitted   = @dblock_step_encoded,   @dblock_step_mark   = '',
                   @dblock_tenant_fitted = @dblock_tenant_encoded, @dblock_tenant_mark = '';
            WHILE LEN(@dblock_tenant_fitted) + LEN(@dblock_tenant_mark) + LEN(@dblock_target_fitted) + LEN(@dblock_target_mark)
                  + LEN(@dblock_step_fitted) + LEN(@dblock_step_mark) > 128 - 8 - @dblock_time_width - 3
            BEGIN
                IF LEN(@dblock_tenant_fitted) >= LEN(@dblock_step_fitted)
                   AND LEN(@dblock_tenant_fitted) >= LEN(@dblock_target_fitted)
                    SELECT @dblock_tenant_mark = '~',
                           @dblock_tenant_fitted = LEFT(@dblock_tenant_fitted, LEN(@dblock_tenant_fitted)
                               - CASE WHEN LEFT(RIGHT(@dblock_tenant_fitted, 3), 1) = '%' THEN 3 ELSE 1 END);
                ELSE IF LEN(@dblock_step_fitted) >= LEN(@dblock_target_fitted)
                    SELECT @dblock_step_mark = '~',
                           @dblock_step_fitted = LEFT(@dblock_step_fitted, LEN(@dblock_step_fitted)
                               - CASE WHEN LEFT(RIGHT(@dblock_step_fitted, 3), 1) = '%' THEN 3 ELSE 1 END);
                ELSE
                    SELECT @dblock_target_mark = '~',
                           @dblock_target_fitted = LEFT(@dblock_target_fitted, LEN(@dblock_target_fitted)
                               - CASE WHEN LEFT(RIGHT(@dblock_target_fitted, 3), 1) = '%' THEN 3 ELSE 1 END);
            END;
            SET @dblock_fields = CONCAT(' ', @dblock_tenant_fitted, @dblock_tenant_mark, ' ', @dblock_target_fitted,
                                        @dblock_target_mark, ' ', @dblock_step_fitted, @dblock_step_mark);
            IF @dblock_time_width = 10
                SET @dblock_holding_fields = @dblock_fields;
            ELSE
                SET @dblock_waiting_fields = @dblock_fields;
            SET @dblock_time_width = @dblock_time_width + 1;
        END;

        -- For the entry in dblock.held.
        SELECT @dblock_hex = '', @dblock_place = 1;
        WHILE @dblock_place <= DATALENGTH(@dblock_before)
        BEGIN
            SET @dblock_byte = CAST(SUBSTRING(@dblock_before, @dblock_place, 1) AS int);
            SET @dblock_hex = @dblock_hex + SUBSTRING('0123456789ABCDEF', @dblock_byte / 16 + 1, 1)
                                          + SUBSTRING('0123456789ABCDEF', @dblock_byte % 16 + 1, 1);
            SET @dblock_place = @dblock_place + 1;
        END;
        SET @dblock_next = CASE WHEN @dblock_permits > 0 THEN N'queue' ELSE N'lock' END;
        SET @dblock_began = SYSUTCDATETIME();
    END;

    -- Take, or wait ----------------------------------------------------------------------------------------------------
    -- Exclusive or shared: the lock, in one wait. With slots: the queue, in one wait; then looks until a permit is free, naps
    -- between them, then the lock, shared, and the permit. Only who holds the queue takes permits, so what a look has found
    -- free stays free, unless somebody else than dblock takes it: then the lock goes back, and the next look comes.

    WHILE @dblock_failure IS NULL AND @dblock_next <> N'held'
    BEGIN
        SET @dblock_waited = DATEDIFF_BIG(millisecond, @dblock_began, SYSUTCDATETIME());
        SET @dblock_left = CASE WHEN @dblock_milliseconds = -1                    THEN -1
                                WHEN @dblock_waited < @dblock_milliseconds THEN @dblock_milliseconds - @dblock_waited
                                ELSE 0 END;

        IF @dblock_next = N'look'
        BEGIN
            SELECT @dblock_slot = 0, @dblock_next = N'nap';
            WHILE @dblock_slot < @dblock_permits AND @dblock_next = N'nap'
            BEGIN
                IF DATALENGTH(@dblock_permit_keys) <= @dblock_slot * 20
                BEGIN
                    -- The number's digits, each as its byte in hexadecimal: 42 is 3432.
                    SET @dblock_sql = CONCAT(
                        N'SET @hash = HASHBYTES(''SHA2_256'', 0x', @dblock_target_hex, N'1F', @dblock_step_hex, N'1F',
                        CASE WHEN @dblock_slot < 10  THEN 30 + @dblock_slot
                             WHEN @dblock_slot < 100 THEN 3030 + @dblock_slot / 10 * 100 + @dblock_slot % 10
                             ELSE 303030 + @dblock_slot / 100 * 10000 + @dblock_slot / 10 % 10 * 100 + @dblock_slot % 10 END,
                        N')');
                    EXEC sys.sp_executesql @dblock_sql, N'@hash varbinary(32) OUTPUT', @hash = @dblock_hash OUTPUT;
                    SET @dblock_permit_keys = @dblock_permit_keys
                        + LEFT(CONCAT(CAST(SUBSTRING(@dblock_hash, 1, 8) AS bigint), SPACE(20)), 20);
                END;
                SET @dblock_permit = CONCAT(N'dblock:', RTRIM(SUBSTRING(@dblock_permit_keys, @dblock_slot * 20 + 1, 20)));

                IF APPLOCK_TEST('public', @dblock_permit, 'Exclusive', @dblock_owner) = 1
                   AND APPLOCK_MODE('public', @dblock_permit, @dblock_owner) = N'NoLock'
                    SET @dblock_next = N'lock';
                ELSE
                BEGIN
                    SELECT @dblock_slot = @dblock_slot + 1, @dblock_permit = NULL;
                    -- Babelfish keeps the error of each test that fails, and has room for four.
                    IF @dblock_babelfish = 1
                    BEGIN
                        BEGIN TRY RAISERROR (N'forget', 16, 1); END TRY
                        BEGIN CATCH SET @dblock_result = NULL; END CATCH;
                    END;
                END;
            END;
        END;
        IF @dblock_next = N'nap' AND @dblock_left = 0
            SET @dblock_result = -1;

        SELECT
            @dblock_asked_resource = CASE @dblock_next WHEN N'queue' THEN @dblock_queue WHEN N'permit' THEN @dblock_permit
                                                       ELSE @dblock_resource END,
            @dblock_asked_mode     = CASE @dblock_next WHEN N'lock' THEN @dblock_mode ELSE N'Exclusive' END,
            @dblock_asked_owner    = CASE @dblock_next WHEN N'queue' THEN N'Session' ELSE @dblock_owner END;
        SET @dblock_asked_free = CASE
            WHEN @dblock_milliseconds = 1 OR @dblock_told = 1 OR @dblock_next = N'permit' THEN 1
            WHEN @dblock_next = N'nap' THEN 0
            ELSE APPLOCK_TEST('public', @dblock_asked_resource, @dblock_asked_mode, @dblock_asked_owner) END;

        -- Who is in the way: for a notice before the wait, and for the error after it.
        IF @dblock_result = -1 OR @dblock_asked_free = 0
        BEGIN
            SELECT @dblock_holder = NULL, @dblock_host = NULL, @dblock_holder_label = NULL, @dblock_others = 0,
                   @dblock_ahead = 0, @dblock_visible = 0, @dblock_told = 1;
            BEGIN TRY
                -- In a text of its own, since only so the refusal of a right is caught. Those ahead have waited longer; who holds
                -- the queue for permits is ahead of all in it. What a session set in a batch that still runs is seen in its
                -- request only. (Babelfish has no such views.)
                -- Inside a transaction a refusal, though caught, may leave it fit for nothing but a ROLLBACK: ask first.
                IF OBJECT_ID(N'sys.dm_tran_locks') IS NOT NULL
                   AND (@@TRANCOUNT = 0
                        OR CAST(SERVERPROPERTY('EngineEdition') AS int) <> 5
                           AND 1 IN (HAS_PERMS_BY_NAME(NULL, NULL, N'VIEW SERVER STATE'),
                                     HAS_PERMS_BY_NAME(NULL, NULL, N'VIEW SERVER PERFORMANCE STATE'))
                        OR CAST(SERVERPROPERTY('EngineEdition') AS int) = 5
                           AND HAS_PERMS_BY_NAME(QUOTENAME(DB_NAME()), N'DATABASE', N'VIEW DATABASE STATE') = 1)
                BEGIN
                    EXEC sys.sp_executesql N'
                        SELECT TOP (1)
                            @holder = h.session_id,
                            @others = h.others,
                            @host   = s.host_name,
                            @label  = ISNULL(r.context_info, s.context_info)
                        FROM (SELECT l.request_session_id AS session_id, COUNT(*) OVER () - 1 AS others
                              FROM sys.dm_tran_locks AS l
                              WHERE l.resource_type = N''APPLICATION''
                                AND l.resource_database_id = DB_ID()
                                AND CHARINDEX(@bracketed, l.resource_description COLLATE Latin1_General_BIN2) > 0
                                AND l.request_status LIKE N''GRANT%''
                              GROUP BY l.request_session_id) AS h
                        LEFT JOIN sys.dm_exec_sessions AS s ON s.session_id = h.session_id
                        LEFT JOIN sys.dm_exec_requests AS r ON r.session_id = h.session_id;

                        SELECT @ahead = COUNT(DISTINCT l.request_session_id)
                        FROM sys.dm_tran_locks AS l
                        LEFT JOIN sys.dm_os_waiting_tasks AS t
                          ON t.resource_address = l.lock_owner_address AND t.session_id = l.request_session_id
                        WHERE l.resource_type = N''APPLICATION''
                          AND l.resource_database_id = DB_ID()
                          AND l.request_session_id <> @@SPID
                          AND (l.request_status NOT LIKE N''GRANT%''
                               AND t.wait_duration_ms > @waited
                               AND (CHARINDEX(@bracketed, l.resource_description COLLATE Latin1_General_BIN2) > 0
                                    OR CHARINDEX(@queue, l.resource_description COLLATE Latin1_General_BIN2) > 0)
                               OR l.request_status LIKE N''GRANT%''
                               AND CHARINDEX(@queue, l.resource_description COLLATE Latin1_General_BIN2) > 0);',
                        N'@bracketed nvarchar(300), @queue nvarchar(300), @waited bigint, @holder int OUTPUT,
                          @others int OUTPUT, @host nvarchar(128) OUTPUT, @label varbinary(128) OUTPUT, @ahead int OUTPUT',
                        @bracketed = @dblock_bracketed,
                        @queue     = @dblock_queue_bracketed,
                        @waited    = @dblock_waited,
                        @holder    = @dblock_holder       OUTPUT,
                        @others    = @dblock_others       OUTPUT,
                        @host      = @dblock_host         OUTPUT,
                        @label     = @dblock_holder_label OUTPUT,
                        @ahead     = @dblock_ahead        OUTPUT;
                    SET @dblock_visible = 1;
                END;
            END TRY
            BEGIN CATCH
                SET @dblock_visible = 0;
            END CATCH;

            -- What the label says, up to the first byte that is not ASCII to be printed. It is believed where it names this
            -- lock; a shortened name as far as it goes.
            SELECT @dblock_said = '', @dblock_place = 1;
            WHILE CAST(SUBSTRING(@dblock_holder_label, @dblock_place, 1) AS int) BETWEEN 32 AND 126
            BEGIN
                SET @dblock_said = @dblock_said + CHAR(CAST(SUBSTRING(@dblock_holder_label, @dblock_place, 1) AS int));
                SET @dblock_place = @dblock_place + 1;
            END;
            SET @dblock_field = 0;
            WHILE @dblock_field <= 4
            BEGIN
                SET @dblock_place = CHARINDEX(' ', @dblock_said + ' ');
                SET @dblock_word = LEFT(@dblock_said, @dblock_place - 1);
                IF @dblock_field = 1
                    SET @dblock_said_time = @dblock_word;
                ELSE IF @dblock_field = 2
                    SET @dblock_said_tenant = @dblock_word;
                ELSE IF @dblock_field = 3
                    SET @dblock_said_target = @dblock_word;
                ELSE IF @dblock_field = 4
                    SET @dblock_said_step = @dblock_word;
                SET @dblock_said = SUBSTRING(@dblock_said, @dblock_place + 1, 128);
                SET @dblock_field = @dblock_field + 1;
            END;
            SET @dblock_since = NULL;
            IF SUBSTRING(@dblock_holder_label, 1, 8) = CAST('dblock1 ' AS varbinary(8))
               AND LEN(@dblock_said_time) BETWEEN 1 AND 10 AND @dblock_said_time NOT LIKE '%[^0-9]%'
               AND (@dblock_said_target COLLATE Latin1_General_BIN2 = @dblock_target_encoded
                    OR RIGHT(@dblock_said_target, 1) = '~' AND @dblock_said_target COLLATE Latin1_General_BIN2
                       = LEFT(@dblock_target_encoded, LEN(@dblock_said_target) - 1) + '~')
               AND (@dblock_said_step COLLATE Latin1_General_BIN2 = @dblock_step_encoded
                    OR RIGHT(@dblock_said_step, 1) = '~' AND @dblock_said_step COLLATE Latin1_General_BIN2
                       = LEFT(@dblock_step_encoded, LEN(@dblock_said_step) - 1) + '~')
                SET @dblock_since = DATEADD(minute, DATEPART(tzoffset, SYSDATETIMEOFFSET()),
                                    DATEADD(second, CAST(CAST(@dblock_said_time AS bigint) % 86400 AS int),
                                    DATEADD(day,    CAST(CAST(@dblock_said_time AS bigint) / 86400 AS int),
                                    CAST('19700101' AS datetime2(0)))));

            -- A host says its own name.
            WHILE PATINDEX(N'%[^ -~]%', @dblock_host COLLATE Latin1_General_BIN2) > 0
                SET @dblock_host = STUFF(@dblock_host,
                                         PATINDEX(N'%[^ -~]%', @dblock_host COLLATE Latin1_General_BIN2), 1, N'?');

            SET @dblock_obstacle = CONCAT(
                CASE
                    WHEN @dblock_visible = 0
                        THEN N'holder not visible to this login'
                    WHEN @dblock_holder IS NULL
                        THEN N'nobody holds it at this moment, as far as this login may see'
                    ELSE CONCAT(
                        CASE WHEN @dblock_since IS NOT NULL AND @dblock_said_tenant <> '-'
                             THEN CONCAT(N'held by tenant ', @dblock_said_tenant)
                             ELSE N'held by a session' END,
                        N' (session ', @dblock_holder,
                        CASE WHEN @dblock_host <> N'' THEN CONCAT(N', host ', @dblock_host) END, N')',
                        CASE WHEN CAST(@dblock_since AS date) = CAST(SYSDATETIME() AS date)
                             THEN CONCAT(N' since ', SUBSTRING(CONVERT(nvarchar(19), @dblock_since, 120), 12, 8))
                             WHEN @dblock_since IS NOT NULL
                             THEN CONCAT(N' since ', CONVERT(nvarchar(19), @dblock_since, 120)) END,
                        CASE WHEN @dblock_others > 0
                             THEN CONCAT(N' and ', @dblock_others, CASE @dblock_others WHEN 1 THEN N' other' ELSE N' others' END)
                             END) END,
                CASE WHEN @dblock_ahead > 0 THEN CONCAT(N'; ', @dblock_ahead, N' ahead') END);
            -- Octopus Deploy acts on ##octopus, wherever it stands in what a step prints.
            SET @dblock_obstacle = REPLACE(@dblock_obstacle, N'##', N'#?');

            IF @dblock_result = -1
                SELECT @dblock_error = 51001,
                       @dblock_failure = CONCAT(@dblock_step, N'@', @dblock_target, N' not acquired ',
                                                CASE WHEN @dblock_timeout LIKE N'%[1-9]%'
                                                     THEN CONCAT(N'in ', @dblock_timeout, N' s') ELSE N'without waiting' END,
                                                N': ', @dblock_obstacle);
            ELSE
                RAISERROR (N'dblock: waiting for %s@%s: %s', 10, 1, @dblock_step, @dblock_target, @dblock_obstacle) WITH NOWAIT;
        END;

        IF @dblock_failure IS NULL AND @dblock_next = N'nap'
        BEGIN
            -- From a millisecond on, growing to 20. A WAITFOR that Babelfish must read would fail there.
            SET @dblock_sql = RIGHT(CONCAT(N'0.0', RIGHT(CONCAT(N'0', @dblock_nap), 2)), 5);
            SET @dblock_sql = CASE @dblock_babelfish
                WHEN 1 THEN CONCAT(N'DECLARE @i int; SELECT @i = 1 FROM pg_catalog.pg_sleep(', @dblock_sql, N') AS p')
                ELSE CONCAT(N'WAITFOR DELAY ''00:00:0', @dblock_sql, N'''') END;
            EXECUTE (@dblock_sql);
            SELECT @dblock_next = N'look',
                   @dblock_nap = CASE WHEN @dblock_nap < 14 THEN @dblock_nap * 14 / 10 + 1 ELSE 20 END;
        END;
        ELSE IF @dblock_failure IS NULL
        BEGIN
            SET @dblock_label = CAST(CONCAT('dblock1 w', DATEDIFF_BIG(second, '19700101', @dblock_began),
                                            @dblock_waiting_fields) AS varbinary(128));
            SET CONTEXT_INFO @dblock_label;
            SET @dblock_waiting = CONCAT(LEFT(@dblock_owner, 1), ' ', DB_ID(), ' ', @dblock_key, ' ',
                                         ISNULL(SUBSTRING(@dblock_permit, 8, 20), N'-'), ' ', @dblock_slot_before, ' ',
                                         @dblock_hex, ';');
            EXEC sys.sp_set_session_context N'dblock.waiting', @dblock_waiting;

            -- 0 would be no wait at all. Babelfish takes that for an error; one millisecond is the same everywhere. Who does not
            -- want to wait at all waits for the queue while another one takes a free permit, which is soon done.
            SET @dblock_left = CASE
                WHEN @dblock_next = N'permit' OR @dblock_left = 0          THEN 1
                WHEN @dblock_next = N'queue' AND @dblock_milliseconds = 1 THEN 100
                ELSE @dblock_left END;
            SELECT @dblock_asked = 1, @dblock_result = NULL;
            EXEC @dblock_result = sys.sp_getapplock
                @Resource    = @dblock_asked_resource,
                @LockMode    = @dblock_asked_mode,
                @LockOwner   = @dblock_asked_owner,
                @LockTimeout = @dblock_left,
                @DbPrincipal = N'public';

            -- Only what the session then has is a grant.
            IF @dblock_result >= 0
               AND APPLOCK_MODE('public', @dblock_asked_resource, @dblock_asked_owner) = @dblock_asked_mode
                SET @dblock_next = CASE WHEN @dblock_next = N'queue'                          THEN N'look'
                                        WHEN @dblock_next = N'lock' AND @dblock_permits > 0 THEN N'permit'
                                        ELSE N'held' END;
            ELSE IF @dblock_result = -1 AND @dblock_next = N'permit'
            BEGIN
                SELECT @dblock_next = N'nap', @dblock_permit = NULL;
                EXEC @dblock_result = sys.sp_releaseapplock
                    @Resource = @dblock_resource, @LockOwner = @dblock_owner, @DbPrincipal = N'public';
                IF ISNULL(@dblock_result, -999) < 0
                    SELECT @dblock_error = 51007,
                           @dblock_failure = CONCAT(@dblock_resource, N': sp_releaseapplock returned ', @dblock_result);
            END;
            ELSE IF ISNULL(@dblock_result, -999) <> -1
                SELECT @dblock_error = CASE @dblock_result WHEN -3 THEN 51002 ELSE 51007 END,
                       @dblock_failure = CONCAT(@dblock_step, N'@', @dblock_target, N' not acquired: ', CASE
                           WHEN @dblock_result = -2 THEN N'the wait was cancelled'
                           WHEN @dblock_result = -3 THEN N'the server ended this wait to break a deadlock'
                           WHEN @dblock_result >= 0 THEN N'sp_getapplock granted it, but this session does not have it'
                           ELSE CONCAT(N'sp_getapplock returned ', ISNULL(CAST(@dblock_result AS nvarchar(12)), N'nothing'))
                           END);
        END;
    END;

    IF @dblock_failure IS NULL AND @dblock_owner = N'Transaction' AND XACT_STATE() <> 1
        SELECT @dblock_error = 51007,
               @dblock_failure = N'an error during the wait has left this transaction fit for nothing but a ROLLBACK';

    IF @dblock_failure IS NULL AND @dblock_permits > 0
    BEGIN
        SELECT @dblock_result = NULL, @dblock_slot_said = @dblock_slot;
        EXEC @dblock_result = sys.sp_releaseapplock
            @Resource = @dblock_queue, @LockOwner = N'Session', @DbPrincipal = N'public';
        IF ISNULL(@dblock_result, -999) < 0
            SELECT @dblock_error = 51007,
                   @dblock_failure = CONCAT(@dblock_queue, N': sp_releaseapplock returned ', @dblock_result);
    END;

    IF @dblock_failure IS NULL
    BEGIN
        SET @dblock_label = CAST(CONCAT('dblock1 ', DATEDIFF_BIG(second, '19700101', SYSUTCDATETIME()),
                                        @dblock_holding_fields) AS varbinary(128));
        SET CONTEXT_INFO @dblock_label;
        SET @dblock_list = @dblock_waiting + @dblock_held;
        EXEC sys.sp_set_session_context N'dblock.held', @dblock_list;
        EXEC sys.sp_set_session_context N'dblock.slot', @dblock_slot_said;
        EXEC sys.sp_set_session_context N'dblock.waiting', NULL;
        EXEC sys.sp_set_session_context N'dblock.failed', NULL;
        SET @dblock_granted = 1;
    END;
END TRY
BEGIN CATCH
    SELECT @dblock_failure = CONCAT(ERROR_MESSAGE(), N' (error ', ERROR_NUMBER(), N')'), @dblock_error = 51007;
END CATCH;

-- Leave ----------------------------------------------------------------------------------------------------------------

IF @dblock_granted = 0 OR @dblock_failure IS NOT NULL
BEGIN
    IF @dblock_asked = 1
    BEGIN
        -- An error does not prove that nothing was taken. What cannot be given back stays in dblock.waiting, for release.sql.
        SET @dblock_place = 1;
        WHILE @dblock_place <= 3
        BEGIN
            SELECT
                @dblock_asked_resource = CASE @dblock_place WHEN 1 THEN @dblock_permit WHEN 2 THEN @dblock_resource
                                                            ELSE @dblock_queue END,
                @dblock_asked_owner    = CASE @dblock_place WHEN 3 THEN N'Session' ELSE @dblock_owner END,
                @dblock_result         = 0;
            BEGIN TRY
                IF @dblock_asked_resource IS NOT NULL AND (@dblock_asked_owner = N'Session' OR @@TRANCOUNT > 0)
                BEGIN
                    IF APPLOCK_MODE('public', @dblock_asked_resource, @dblock_asked_owner) <> N'NoLock'
                        EXEC @dblock_result = sys.sp_releaseapplock
                            @Resource = @dblock_asked_resource, @LockOwner = @dblock_asked_owner, @DbPrincipal = N'public';
                END;
                IF ISNULL(@dblock_result, -999) < 0
                    SELECT @dblock_stuck = @dblock_stuck + 1,
                           @dblock_failure = CONCAT(@dblock_failure, N'; and then: ', @dblock_asked_resource,
                                                    N' could not be given back (', @dblock_result, N')');
            END TRY
            BEGIN CATCH
                SELECT @dblock_stuck = @dblock_stuck + 1,
                       @dblock_failure = CONCAT(@dblock_failure, N'; and then: ', ERROR_MESSAGE());
            END CATCH;
            SET @dblock_place = @dblock_place + 1;
        END;

        BEGIN TRY
            SET CONTEXT_INFO @dblock_before;
            EXEC sys.sp_set_session_context N'dblock.held', @dblock_held;
            SET @dblock_slot_said = NULLIF(@dblock_slot_before, '-');
            EXEC sys.sp_set_session_context N'dblock.slot', @dblock_slot_said;
            IF @dblock_stuck = 0
                EXEC sys.sp_set_session_context N'dblock.waiting', NULL;
        END TRY
        BEGIN CATCH
            SET @dblock_failure = CONCAT(@dblock_failure, N'; and then: ', ERROR_MESSAGE());
        END CATCH;
    END;

    -- NOEXEC last, since nothing runs after it. Babelfish knows PARSEONLY only, in a text of its own, from the next batch on.
    IF @dblock_babelfish = 1
        EXECUTE (N'SET PARSEONLY ON');
    SELECT @dblock_failure = ISNULL(@dblock_failure, N'not acquired'), @dblock_error = ISNULL(@dblock_error, 51007);
    SET @dblock_state = @dblock_error - 51000;
    RAISERROR (N'%d dblock: %s', 16, @dblock_state, @dblock_error, @dblock_failure);
    SET NOEXEC ON;
    RETURN;
END;
