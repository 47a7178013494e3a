/*
dblock release, for SQL Server 2016 and later, and Azure SQL

Gives back the lock that acquire.sql took last in this session, and the session its context_info. Locks that were taken one
after the other are given back in reverse, one with each run. A lock that was taken with dblock.scope = transaction stays until
COMMIT or ROLLBACK, before which this script only looks whether it is held to the end.

Needs       the session of acquire.sql, in autocommit: the work must be committed before the lock is given back, since the next
            holder would not see it otherwise. An error in the step does no harm, nor does USE: the lock is given back in the
            database in which it was taken. With dblock.scope = transaction: inside that transaction.

Use         after the step, in the same way as acquire.sql, whose header shows it for each tool. One batch.

After an acquire.sql that failed it opens the session again. It gives back nothing then, since each acquire.sql has its own
release.sql, and the locks that were taken before that one are still needed.

If it fails it raises error 50000 (severity 16, state as below), whose message begins with one of these:
    51004   4   there is no lock to give back: acquire.sql failed or was cut off; or this session holds no lock of
                acquire.sql; or the lock was given back by somebody else, or ended with its transaction. After the cut off one:
                what the session ran since ran WITHOUT the lock, for all that it could know
    51005   5   inside a transaction; the lock is still held
    51007   7   the server refused the call: the lock is held until the session ends. Or the lock was taken in a database that is
                gone, or that this login does not see from here: USE it and run release.sql again
*/
SET NOEXEC OFF;
SET PARSEONLY OFF;

DECLARE
    -- Written by acquire.sql, whose DECLARE describes them.
    @dblock_release_held      varchar(8000),
    @dblock_release_waiting   varchar(8000),
    @dblock_release_failed    int,

    -- The entry, and its fields.
    @dblock_release_entry     varchar(8000),
    @dblock_release_field     int,
    @dblock_release_place     int,
    @dblock_release_next      int,
    @dblock_release_word      varchar(300),
    @dblock_release_owner     nvarchar(32),
    @dblock_release_database  int,
    @dblock_release_lock      nvarchar(255),
    @dblock_release_permit    nvarchar(255),
    @dblock_release_slot      nvarchar(10),
    @dblock_release_before    varbinary(128),

    -- What is given back: the permit, the lock, and what a wait has left of the queue for permits.
    @dblock_release_part      int = 1,
    @dblock_release_resource  nvarchar(255),
    @dblock_release_whose     nvarchar(32),
    @dblock_release_keep      bit = 0,
    @dblock_release_sql       nvarchar(4000),
    @dblock_release_there     nvarchar(300),
    @dblock_release_result    int,
    @dblock_release_missing   nvarchar(255),

    @dblock_release_failure   nvarchar(2000),
    @dblock_release_error     int,
    @dblock_release_state     int;

BEGIN TRY
    SELECT
        @dblock_release_held    = ISNULL(CAST(SESSION_CONTEXT(N'dblock.held')    AS varchar(8000)), ''),
        @dblock_release_waiting = ISNULL(CAST(SESSION_CONTEXT(N'dblock.waiting') AS varchar(8000)), ''),
        @dblock_release_failed  = ISNULL(TRY_CAST(CAST(SESSION_CONTEXT(N'dblock.failed') AS nvarchar(20)) AS int), 0),
        @dblock_release_entry   = '';

    IF @dblock_release_failed > 0 OR @dblock_release_waiting <> ''
    BEGIN
        SET @dblock_release_error = 51004;
        SET @dblock_release_failure = CASE
            WHEN @dblock_release_waiting <> ''
                THEN N'acquire.sql was cut off in the middle (a command timeout, a cancel): what this session ran since ran'
                   + N' WITHOUT the lock'
            ELSE N'acquire.sql failed, so there is no lock to give back' END
            + CASE WHEN @dblock_release_failed > 1
                   THEN N'. The session stays closed, since another acquire.sql failed too: run release.sql for that one'
                   ELSE N'. The session is open again' END;
        SET @dblock_release_failed = CASE WHEN @dblock_release_failed > 0 THEN @dblock_release_failed - 1 ELSE 0 END;
        EXEC sys.sp_set_session_context N'dblock.failed', @dblock_release_failed;
        -- A cancel may have met the grant.
        SET @dblock_release_entry = @dblock_release_waiting;
    END;
    ELSE IF @dblock_release_held = ''
        SELECT @dblock_release_error = 51004, @dblock_release_failure = N'this session holds no lock that acquire.sql took';
    ELSE
        SET @dblock_release_entry = LEFT(@dblock_release_held, CHARINDEX(';', @dblock_release_held));

    -- An entry: `owner database key permit slot before;`
    IF @dblock_release_entry COLLATE Latin1_General_BIN2 NOT LIKE '[ST] [0-9]% %[0-9] [-0-9]% [-0-9]% %;'
       OR @dblock_release_entry COLLATE Latin1_General_BIN2 LIKE '_%[^-0-9A-F ;]%'
    BEGIN
        SET @dblock_release_entry = '';
        IF @dblock_release_error IS NULL
            SELECT @dblock_release_error = 51004,
                   @dblock_release_failure = N'dblock.held does not hold what acquire.sql wrote';
    END;
    ELSE IF @dblock_release_error IS NULL AND @dblock_release_entry LIKE 'S%' AND @@TRANCOUNT > 0
        SELECT @dblock_release_error = 51005,
               @dblock_release_failure = N'inside a transaction the lock would be given back before the work is committed;'
                                       + N' COMMIT or ROLLBACK first',
               @dblock_release_entry = '';

    IF @dblock_release_entry <> ''
    BEGIN
        SELECT @dblock_release_field = 1, @dblock_release_place = 1;
        WHILE @dblock_release_field <= 6
        BEGIN
            SET @dblock_release_next = CHARINDEX(' ', REPLACE(@dblock_release_entry, ';', ' '), @dblock_release_place);
            SET @dblock_release_word = SUBSTRING(@dblock_release_entry, @dblock_release_place,
                                                 @dblock_release_next - @dblock_release_place);
            IF @dblock_release_field = 1
                SET @dblock_release_owner = CASE @dblock_release_word WHEN 'T' THEN N'Transaction' ELSE N'Session' END;
            ELSE IF @dblock_release_field = 2
                SET @dblock_release_database = TRY_CAST(@dblock_release_word AS int);
            ELSE IF @dblock_release_field = 3
                SET @dblock_release_lock = CONCAT(N'dblock:', @dblock_release_word);
            ELSE IF @dblock_release_field = 4 AND @dblock_release_word <> '-'
                SET @dblock_release_permit = CONCAT(N'dblock:', @dblock_release_word);
            ELSE IF @dblock_release_field = 5
                SET @dblock_release_slot = NULLIF(@dblock_release_word, '-');
            ELSE IF @dblock_release_field = 6
            BEGIN
                SET @dblock_release_sql = CONCAT(N'SET @before = 0x', @dblock_release_word);
                EXEC sys.sp_executesql @dblock_release_sql, N'@before varbinary(128) OUTPUT',
                    @before = @dblock_release_before OUTPUT;
            END;
            SELECT @dblock_release_place = @dblock_release_next + 1, @dblock_release_field = @dblock_release_field + 1;
        END;

        -- The transaction's lock stays until its end; what is left of a wait does not.
        IF @dblock_release_owner = N'Transaction' AND @dblock_release_waiting = ''
            SET @dblock_release_keep = 1;

        -- An application lock is known only in its own database; on Babelfish in all, and there no procedure of another one can
        -- be called. A database without a name is gone, or hidden from this login here: the entry stays.
        SET @dblock_release_sql = N'
            IF @owner = N''Session'' OR @@TRANCOUNT > 0
            BEGIN
                IF APPLOCK_MODE(''public'', @resource, @owner) <> N''NoLock''
                BEGIN
                    SET @result = 0;
                    IF @keep = 0
                        EXEC @result = sys.sp_releaseapplock
                            @Resource = @resource, @LockOwner = @owner, @DbPrincipal = N''public'';
                END;
            END;';
        IF @dblock_release_database <> DB_ID() AND SERVERPROPERTY('Babelfish') IS NULL
            SELECT @dblock_release_there = CONCAT(QUOTENAME(DB_NAME(@dblock_release_database)), N'.sys.sp_executesql'),
                   @dblock_release_result = CASE WHEN DB_NAME(@dblock_release_database) IS NULL THEN -1 END;

        WHILE @dblock_release_part <= 3 AND ISNULL(@dblock_release_result, 0) >= 0
        BEGIN
            SELECT
                @dblock_release_resource = CASE
                    WHEN @dblock_release_part = 1          THEN @dblock_release_permit
                    WHEN @dblock_release_part = 2          THEN @dblock_release_lock
                    WHEN @dblock_release_waiting <> '' THEN @dblock_release_lock + N'q' END,
                @dblock_release_whose    = CASE WHEN @dblock_release_part = 3 THEN N'Session' ELSE @dblock_release_owner END,
                @dblock_release_result   = NULL;
            IF @dblock_release_resource IS NOT NULL
            BEGIN
                IF @dblock_release_there IS NULL
                    EXEC sys.sp_executesql @dblock_release_sql,
                        N'@resource nvarchar(255), @owner nvarchar(32), @keep bit, @result int OUTPUT',
                        @resource = @dblock_release_resource, @owner  = @dblock_release_whose,
                        @keep     = @dblock_release_keep,     @result = @dblock_release_result OUTPUT;
                ELSE
                    EXEC @dblock_release_there @dblock_release_sql,
                        N'@resource nvarchar(255), @owner nvarchar(32), @keep bit, @result int OUTPUT',
                        @resource = @dblock_release_resource, @owner  = @dblock_release_whose,
                        @keep     = @dblock_release_keep,     @result = @dblock_release_result OUTPUT;
                IF @dblock_release_result IS NULL
                    SET @dblock_release_missing = @dblock_release_resource;
            END;
            SET @dblock_release_part = @dblock_release_part + 1;
        END;

        IF @dblock_release_result < 0 AND @dblock_release_resource IS NULL
            SELECT @dblock_release_error = 51007,
                   @dblock_release_failure = CONCAT(@dblock_release_lock, N' was taken in a database that is gone, or that this',
                                                    N' login does not see from here: USE it and run release.sql again');
        ELSE IF @dblock_release_result < 0
            SELECT @dblock_release_error = 51007,
                   @dblock_release_failure = CONCAT(@dblock_release_resource, N': sp_releaseapplock returned ',
                                                    @dblock_release_result);
        ELSE
        BEGIN
            IF @dblock_release_missing IS NOT NULL AND @dblock_release_failure IS NULL
                SELECT @dblock_release_error = 51004,
                       @dblock_release_failure = CASE @dblock_release_owner
                           WHEN N'Transaction'
                               THEN CONCAT(@dblock_release_missing, N' is no longer held: it ended with its transaction; run',
                                           N' release.sql before the COMMIT')
                           ELSE CONCAT(@dblock_release_missing, N' was given back by somebody else while it was held: what ran',
                                       N' since may have run beside another holder') END;
            SET CONTEXT_INFO @dblock_release_before;
            EXEC sys.sp_set_session_context N'dblock.slot', @dblock_release_slot;
            IF @dblock_release_waiting <> ''
                EXEC sys.sp_set_session_context N'dblock.waiting', NULL;
            ELSE
            BEGIN
                SET @dblock_release_held = SUBSTRING(@dblock_release_held, LEN(@dblock_release_entry) + 1, 8000);
                EXEC sys.sp_set_session_context N'dblock.held', @dblock_release_held;
            END;
        END;
    END;
    ELSE IF @dblock_release_waiting <> ''
        EXEC sys.sp_set_session_context N'dblock.waiting', NULL;        -- nothing that acquire.sql wrote
END TRY
BEGIN CATCH
    SELECT @dblock_release_failure = CONCAT(ERROR_MESSAGE(), N' (error ', ERROR_NUMBER(), N')'), @dblock_release_error = 51007;
END CATCH;

IF @dblock_release_error IS NOT NULL
BEGIN
    -- Closed in the same way as by acquire.sql.
    IF @dblock_release_failed > 0 AND SERVERPROPERTY('Babelfish') IS NOT NULL
        EXECUTE (N'SET PARSEONLY ON');
    SET @dblock_release_state = @dblock_release_error - 51000;
    RAISERROR (N'%d dblock: %s', 16, @dblock_release_state, @dblock_release_error, @dblock_release_failure);
    IF @dblock_release_failed > 0
        SET NOEXEC ON;
    RETURN;
END;
