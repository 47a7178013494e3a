/*
dblock force_release, for SQL Server 2016 to 2025, Azure SQL Database and Managed Instance

Shows who holds one lock, several sessions if it is shared or has slots; and, told which of them, ends that one, only if it
still holds that lock. The server then gives back all that the session held, its slot too, and hands the lock on. What the
session was doing is rolled back or stays half done: look first whether it is really gone or stuck (inspect.sql shows who it is).

Needs       to look: VIEW SERVER STATE; from SQL Server 2022 VIEW SERVER PERFORMANCE STATE; in Azure SQL Database VIEW DATABASE
            STATE (see inspect.sql). Without it the server answers with errors 300 and 297, and nothing is done.
            To end: ALTER ANY CONNECTION, which members of processadmin and sysadmin have; in Azure SQL Database KILL DATABASE
            CONNECTION, which the server's admin has. And not inside a transaction, where the server refuses KILL: a driver
            that is not in autocommit has opened one, and under IMPLICIT_TRANSACTIONS this script itself does; SET it OFF.
            One batch. Nothing is created. A readable secondary's locks are its own.

Settings    read from the session context
    dblock.target, dblock.step    the names of the lock, as nvarchar: N'web-01'
    dblock.key                    or its number; with both they must agree
    dblock.confirm                the session_id of the holder to end. Absent: only look. It is cleared by this script

sqlcmd      sqlcmd -f 65001 -d shared -W -i web-01-b.sql,force_release.sql
            where web-01-b.sql, of your own, sets the names:
                EXEC sp_set_session_context N'dblock.target', N'web-01';
                EXEC sp_set_session_context N'dblock.step', N'b';
            then, with the pid that it showed, a third line in it:
                EXEC sp_set_session_context N'dblock.confirm', N'57';
SSMS        run such lines in the same window before this file
a driver    EXEC sp_set_session_context N'dblock.key', N'3736245238665493732'
            EXEC sp_set_session_context N'dblock.confirm', N'57'
            the text of this file, without parameters, on the same connection, in autocommit

In a session in which acquire.sql has failed nothing runs, nor does this: use another.

Columns, one row for each holder, or one that says why there is none; those of PostgreSQL's force_release.sql
    outcome                 what happened, or what to do next
    pid, host, user         the holder's session_id, host_name and login_name
    application             its label, if dblock took the lock: dblock1 SECONDS-SINCE-1970 TENANT TARGET STEP; or program_name
    since                   of the grant, as that label says
    activity, query_start   what the session does, and since when: of its last batch
    key                     the lock
*/
DECLARE @counting int = CASE WHEN @@OPTIONS & 512 = 0 THEN 1 ELSE 0 END;
SET NOCOUNT ON;

DECLARE @target  nvarchar(4000) = ISNULL(CAST(SESSION_CONTEXT(N'dblock.target')  AS nvarchar(4000)), N''),
        @step    nvarchar(4000) = ISNULL(CAST(SESSION_CONTEXT(N'dblock.step')    AS nvarchar(4000)), N''),
        @key     nvarchar(4000) = ISNULL(CAST(SESSION_CONTEXT(N'dblock.key')     AS nvarchar(4000)), N''),
        @confirm nvarchar(4000) = ISNULL(CAST(SESSION_CONTEXT(N'dblock.confirm') AS nvarchar(4000)), N''),
        @target_type nvarchar(128) = CAST(SQL_VARIANT_PROPERTY(SESSION_CONTEXT(N'dblock.target'), 'BaseType') AS nvarchar(128)),
        @step_type   nvarchar(128) = CAST(SQL_VARIANT_PROPERTY(SESSION_CONTEXT(N'dblock.step'),   'BaseType') AS nvarchar(128));

-- Read above, cleared here: it must not hit another session in a later run. A read-only one cannot be cleared.
EXEC sys.sp_set_session_context N'dblock.confirm', NULL;
IF SESSION_CONTEXT(N'dblock.confirm') IS NOT NULL
BEGIN
    IF @counting = 1 SET NOCOUNT OFF;
    RETURN;
END;


-- The key of the names: their UTF-8, a 0x1F between them. They are not judged as acquire.sql judges them: names that it refuses
-- have a key that nobody holds. But in one that is not nvarchar the server may have changed letters.

DECLARE @names nvarchar(max) = CAST(@target AS nvarchar(max)) + NCHAR(31) + @step,
        @by_names int = CASE WHEN DATALENGTH(@target) > 0 OR DATALENGTH(@step) > 0 THEN 1 ELSE 0 END,
        @both_names int = CASE WHEN DATALENGTH(@target) > 0 AND DATALENGTH(@step) > 0 THEN 1 ELSE 0 END,
        @at int = 1, @code int, @half int, @byte int, @to_come int,
        @hex varchar(max) = '', @statement nvarchar(max), @hash varbinary(32), @key_of_names bigint;

IF @target_type COLLATE Latin1_General_BIN2 <> N'nvarchar' OR @step_type COLLATE Latin1_General_BIN2 <> N'nvarchar'
    SET @both_names = 0;

WHILE @both_names = 1 AND DATALENGTH(SUBSTRING(@names COLLATE Latin1_General_BIN2, @at, 1)) > 0
BEGIN
    SET @code = UNICODE(SUBSTRING(@names COLLATE Latin1_General_BIN2, @at, 1));
    SET @half = UNICODE(SUBSTRING(@names COLLATE Latin1_General_BIN2, @at + 1, 1));
    SET @at = @at + 1;
    IF @code BETWEEN 55296 AND 56319 AND @half BETWEEN 56320 AND 57343
        SELECT @code = (@code - 55296) * 1024 + @half - 56320 + 65536, @at = @at + 1;

    SET @to_come = CASE WHEN @code < 128 THEN 0 WHEN @code < 2048 THEN 1 WHEN @code < 65536 THEN 2 ELSE 3 END;
    SET @byte = CASE @to_come WHEN 0 THEN @code
                              WHEN 1 THEN 192 + @code / 64
                              WHEN 2 THEN 224 + @code / 4096
                              ELSE        240 + @code / 262144 END;
    WHILE @to_come >= 0
    BEGIN
        SET @hex = @hex + SUBSTRING('0123456789ABCDEF', @byte / 16 + 1, 1) + SUBSTRING('0123456789ABCDEF', @byte % 16 + 1, 1);
        SET @to_come = @to_come - 1;
        SET @byte = 128 + @code / CASE @to_come WHEN 2 THEN 4096 WHEN 1 THEN 64 ELSE 1 END % 64;
    END;
END;

IF @both_names = 1
BEGIN
    SET @statement = N'SET @hash = HASHBYTES(''SHA2_256'', 0x' + @hex + N')';       -- hex digits only
    EXEC sys.sp_executesql @statement, N'@hash varbinary(32) OUTPUT', @hash = @hash OUTPUT;
    SET @key_of_names = CAST(SUBSTRING(@hash, 1, 8) AS bigint);
END;


-- The wish, judged.

DECLARE @number decimal(20) = CASE WHEN @key COLLATE Latin1_General_BIN2 LIKE N'%[0-9]' AND LEN(@key) <= 20
                                      AND LEFT(@key, 1) COLLATE Latin1_General_BIN2 LIKE N'[-0-9]'
                                      AND SUBSTRING(@key, 2, 20) COLLATE Latin1_General_BIN2 NOT LIKE N'%[^0-9]%'
                                     THEN CAST(@key AS decimal(20)) END,
        @key_of_number bigint,
        @lock_key bigint,
        @refused nvarchar(400);

IF @number BETWEEN -9223372036854775808 AND 9223372036854775807
    SET @key_of_number = CAST(@number AS bigint);
SET @lock_key = COALESCE(@key_of_number, @key_of_names);
SET @refused = CASE
    WHEN @by_names = 0 AND DATALENGTH(@key) = 0
        THEN N'refused: neither dblock.target and dblock.step nor dblock.key is set'
    WHEN DATALENGTH(@key) > 0 AND @key_of_number IS NULL
        THEN N'refused: dblock.key is no key'
    WHEN @by_names = 1 AND @key_of_names IS NULL
        THEN N'refused: dblock.target and dblock.step must both be set, as nvarchar: N''...'''
    WHEN @key_of_names IS NOT NULL AND @key_of_number IS NOT NULL AND @key_of_names <> @key_of_number
        THEN N'refused: dblock.target and dblock.step have the key ' + CAST(@key_of_names AS nvarchar(20))
             + N', dblock.key is another'
    WHEN DATALENGTH(@confirm) > 0
         AND (@confirm COLLATE Latin1_General_BIN2 LIKE N'%[^0-9]%' OR @confirm LIKE N'0%' OR LEN(@confirm) > 10)
        THEN N'refused: dblock.confirm is no pid'
END;


-- The holders. The label stands in context_info; what a batch has set, only its request shows until it ends.

DECLARE @holders table (
    session     int,
    lost        uniqueidentifier,                       -- a distributed transaction without a session
    confirmed   int,
    host        nvarchar(128) COLLATE Latin1_General_BIN2,
    login       nvarchar(128) COLLATE Latin1_General_BIN2,
    application nvarchar(128) COLLATE Latin1_General_BIN2,
    activity    nvarchar(30),
    query_start datetime
);
DECLARE @resource nvarchar(100) = N'0:[[]dblock:' + CAST(@lock_key AS nvarchar(20)) + N']:(%)',
        @rows int = 1;

INSERT INTO @holders (session, lost, confirmed, host, login, application, activity, query_start)
SELECT l.request_session_id,
       l.lost,
       CASE WHEN CAST(l.request_session_id AS nvarchar(11)) = @confirm THEN 1 ELSE 0 END,
       s.host_name,
       s.login_name,
       CASE WHEN context.text LIKE 'dblock1 %'
            THEN LEFT(context.text, NULLIF(PATINDEX('%[^ -~]%', context.text + CHAR(10)), 0) - 1)
            ELSE s.program_name COLLATE Latin1_General_BIN2
       END,
       s.status,
       s.last_request_start_time
FROM (SELECT DISTINCT k.request_session_id, CASE WHEN k.request_session_id < 0 THEN k.request_owner_guid END AS lost
      FROM sys.dm_tran_locks AS k
      WHERE k.resource_type = N'APPLICATION'
        AND k.resource_database_id = DB_ID()
        AND RTRIM(k.resource_description) COLLATE Latin1_General_BIN2 LIKE @resource
        AND k.resource_description NOT LIKE N'%]%]%'
        AND k.request_status <> N'WAIT') AS l
LEFT JOIN sys.dm_exec_sessions AS s ON s.session_id = l.request_session_id
OUTER APPLY (SELECT TOP (1) r.context_info
             FROM sys.dm_exec_requests AS r
             WHERE r.session_id = s.session_id
             ORDER BY r.request_id) AS batch
CROSS APPLY (SELECT CAST(COALESCE(batch.context_info, s.context_info) AS varchar(128)) COLLATE Latin1_General_BIN2
            ) AS context(text)
WHERE @refused IS NULL;

IF @@ERROR <> 0
BEGIN
    IF @counting = 1 SET NOCOUNT OFF;
    RETURN;
END;


-- The one place that ends anything: at most one row is confirmed.

DECLARE @pid int, @failure int, @message nvarchar(4000), @gone int = 0, @deadline datetime2(3);

SELECT @pid = h.session
FROM @holders AS h
WHERE h.confirmed = 1 AND h.session > 0 AND h.session <> @@SPID;

IF @pid IS NOT NULL AND @@TRANCOUNT = 0
BEGIN
    BEGIN TRY
        SET @statement = N'KILL ' + CAST(@pid AS nvarchar(11));
        EXEC (@statement);
    END TRY
    BEGIN CATCH
        SELECT @failure = ERROR_NUMBER(), @message = ERROR_MESSAGE();
    END CATCH;

    SET @deadline = DATEADD(second, 5, SYSUTCDATETIME());
    WHILE @failure IS NULL AND @gone = 0 AND SYSUTCDATETIME() < @deadline
    BEGIN
        IF EXISTS (SELECT 1
                   FROM sys.dm_tran_locks AS k
                   WHERE k.request_session_id = @pid
                     AND k.resource_type = N'APPLICATION'
                     AND k.resource_database_id = DB_ID()
                     AND RTRIM(k.resource_description) COLLATE Latin1_General_BIN2 LIKE @resource)
            WAITFOR DELAY '00:00:00.020';
        ELSE
            SET @gone = 1;
    END;
END;


-- Texts that the sessions say of themselves: what is not printable ASCII is not shown.

WHILE @rows > 0
BEGIN
    UPDATE @holders
    SET host        = ISNULL(STUFF(host,        NULLIF(PATINDEX(N'%[^ -~]%', host),        0), 1, N'?'), host),
        login       = ISNULL(STUFF(login,       NULLIF(PATINDEX(N'%[^ -~]%', login),       0), 1, N'?'), login),
        application = ISNULL(STUFF(application, NULLIF(PATINDEX(N'%[^ -~]%', application), 0), 1, N'?'), application)
    WHERE PATINDEX(N'%[^ -~]%', host) > 0 OR PATINDEX(N'%[^ -~]%', login) > 0 OR PATINDEX(N'%[^ -~]%', application) > 0;
    SET @rows = @@ROWCOUNT;
END;


-- The answer.

DECLARE @permitted int = CASE WHEN CAST(SERVERPROPERTY('EngineEdition') AS int) = 5
                              THEN HAS_PERMS_BY_NAME(QUOTENAME(DB_NAME()), N'DATABASE', N'KILL DATABASE CONNECTION')
                              ELSE HAS_PERMS_BY_NAME(NULL, NULL, N'ALTER ANY CONNECTION') END;

SELECT CASE
           WHEN @refused IS NOT NULL
               THEN @refused
           WHEN h.session IS NULL AND DATALENGTH(@confirm) > 0
               THEN N'nothing was ended: pid ' + @confirm + N' does not hold this lock, nor does anybody'
           WHEN h.session IS NULL
               THEN N'nobody holds this lock'
           WHEN h.session < 0
               THEN N'held by a distributed transaction, which has no session to end; to end it: KILL '''
                    + CAST(h.lost AS nvarchar(36)) + N''''
           WHEN DATALENGTH(@confirm) > 0 AND NOT EXISTS (SELECT 1 FROM @holders AS c WHERE c.confirmed = 1)
               THEN N'nothing was ended: pid ' + @confirm + N' does not hold this lock, this session does'
           WHEN h.session = @@SPID
               THEN N'nothing was ended: your own session holds it; release.sql gives it back, where it is a transaction''s '
                    + N'COMMIT or ROLLBACK, or EXEC sp_releaseapplock '
                    + N'@Resource = N''dblock:' + CAST(@lock_key AS nvarchar(20)) + N''', @LockOwner = N''Session'', '
                    + N'@DbPrincipal = N''public'''
           WHEN h.confirmed = 0 AND @permitted = 0 OR h.confirmed = 1 AND @failure = 6102
               THEN CASE h.confirmed WHEN 1 THEN N'nothing was ended' ELSE N'held' END
                    + N': you may not end this session; who has ALTER ANY CONNECTION, or in Azure SQL Database KILL DATABASE '
                    + N'CONNECTION, may: KILL ' + CAST(h.session AS nvarchar(11))
           WHEN h.confirmed = 0
               THEN N'held: to end this session, EXEC sp_set_session_context N''dblock.confirm'', N'''
                    + CAST(h.session AS nvarchar(11)) + N''' and run this again'
           WHEN @failure IS NOT NULL
               THEN N'nothing was ended: ' + @message
           WHEN @@TRANCOUNT > 0
               THEN N'nothing was ended: the server refuses KILL inside a transaction; COMMIT or ROLLBACK, SET '
                    + N'IMPLICIT_TRANSACTIONS OFF, set dblock.confirm and run this again'
           WHEN @gone = 1
               THEN N'ended: the server has given back all that the session held'
           ELSE N'told to end, but not gone after 5 s: run this again without dblock.confirm to see whether it still holds'
       END AS outcome,
       CASE WHEN h.session > 0 THEN h.session END AS pid,
       h.host,
       h.login AS [user],
       h.application,
       CAST(DATEADD(second, label.seconds % 86400, DATEADD(day, label.seconds / 86400, CAST('1970-01-01' AS datetime2(0))))
            AS datetimeoffset(0)) AS since,
       h.activity,
       TODATETIMEOFFSET(h.query_start, DATEPART(tz, SYSDATETIMEOFFSET())) AS query_start,
       @lock_key AS [key]
FROM (SELECT 1) AS one(row)
LEFT JOIN @holders AS h ON 1 = 1
CROSS APPLY (SELECT CASE WHEN h.application LIKE 'dblock1 [0-9]% %'
                         THEN SUBSTRING(h.application, 9, CHARINDEX(' ', h.application, 9) - 9)
                    END) AS said(seconds)
CROSS APPLY (SELECT CASE WHEN said.seconds NOT LIKE '%[^0-9]%' AND LEN(said.seconds) <= 11
                         THEN CAST(said.seconds AS bigint)
                    END) AS label(seconds)
ORDER BY h.confirmed DESC, h.session;

IF @counting = 1 SET NOCOUNT OFF;
