/*
dblock key, for SQL Server 2016 and later, and Azure SQL

The number that names the lock for one step on one target, and how it stands in the server's views. Takes no lock.

Needs       a login, no other rights. One batch.

Settings    read from the session's context, and left as they are; N'...' as for acquire.sql
    dblock.target, dblock.step    the names of the lock

Use         with wishes.sql as acquire.sql's header has it:
sqlcmd      sqlcmd -f 65001 -S server -d shared -i wishes.sql,key.sql
others      wishes.sql, then the text of this file, on one connection
After an acquire.sql that failed nothing runs, and so this does not: first release.sql.

Columns
    key                 the same number as `dblock key` gives; on PostgreSQL what pg_advisory_lock takes
    resource            what sp_getapplock takes as @Resource, with @DbPrincipal = N'public'
    in_dm_tran_locks    a condition that finds the lock's own rows in sys.dm_tran_locks: holders (request_status GRANT) and
                        those who wait (WAIT). A lock is one of this database
    is_free             a statement that says whether it is free: 1, else 0. It takes nothing
    refused             why these names have no key; then everything else is NULL
*/
DECLARE
    @dblock_key_target        nvarchar(4000) = ISNULL(CAST(SESSION_CONTEXT(N'dblock.target') AS nvarchar(4000)), N''),
    @dblock_key_step          nvarchar(4000) = ISNULL(CAST(SESSION_CONTEXT(N'dblock.step')   AS nvarchar(4000)), N''),

    -- Names: one after the other, character by character.
    @dblock_key_field         int = 1,
    @dblock_key_text          nvarchar(4000),
    @dblock_key_type          nvarchar(128),
    @dblock_key_flaw          nvarchar(200),
    @dblock_key_place         int,
    @dblock_key_code          int,
    @dblock_key_low           int,
    @dblock_key_byte          int,
    @dblock_key_following     int,
    @dblock_key_bytes         int,
    @dblock_key_preimage      varchar(1200) = '',
    @dblock_key_refused       nvarchar(400),

    @dblock_key_sql           nvarchar(4000),
    @dblock_key_hash          varbinary(32),
    @dblock_key_value         bigint;

WHILE @dblock_key_field <= 2
BEGIN
    SELECT
        @dblock_key_text  = CASE @dblock_key_field WHEN 1 THEN @dblock_key_target ELSE @dblock_key_step END,
        @dblock_key_type  = CAST(SQL_VARIANT_PROPERTY(CASE @dblock_key_field WHEN 1 THEN SESSION_CONTEXT(N'dblock.target')
                                                                             ELSE SESSION_CONTEXT(N'dblock.step') END,
                                                      'BaseType') AS nvarchar(128)),
        @dblock_key_flaw  = NULL,
        @dblock_key_place = 1,
        @dblock_key_code  = 0,
        @dblock_key_bytes = 0;

    -- In UTF-8, as hexadecimal digits, as far as names may be long. Only integers judge: the server's `=` folds and ignores
    -- trailing spaces. A binary collation gives the code units one by one.
    WHILE @dblock_key_bytes <= 255
          AND DATALENGTH(SUBSTRING(@dblock_key_text COLLATE Latin1_General_BIN2, @dblock_key_place, 1)) > 0
    BEGIN
        SET @dblock_key_code = UNICODE(SUBSTRING(@dblock_key_text COLLATE Latin1_General_BIN2, @dblock_key_place, 1));
        SET @dblock_key_place = @dblock_key_place + 1;
        IF @dblock_key_code BETWEEN 55296 AND 57343
        BEGIN
            SET @dblock_key_low = UNICODE(SUBSTRING(@dblock_key_text COLLATE Latin1_General_BIN2, @dblock_key_place, 1));
            IF @dblock_key_code < 56320 AND @dblock_key_low BETWEEN 56320 AND 57343
                SELECT @dblock_key_code  = 65536 + (@dblock_key_code - 55296) * 1024 + @dblock_key_low - 56320,
                       @dblock_key_place = @dblock_key_place + 1;
            ELSE
                SET @dblock_key_flaw = ISNULL(@dblock_key_flaw, N' holds a lone surrogate');
        END;
        IF @dblock_key_code < 32 OR @dblock_key_code = 127
            SET @dblock_key_flaw = ISNULL(@dblock_key_flaw, N' holds a control character');
        IF @dblock_key_code = 32 AND @dblock_key_bytes = 0
            SET @dblock_key_flaw = ISNULL(@dblock_key_flaw, N' begins or ends with a space');

        SET @dblock_key_following = CASE WHEN @dblock_key_code < 128   THEN 0
                                         WHEN @dblock_key_code < 2048  THEN 1
                                         WHEN @dblock_key_code < 65536 THEN 2
                                         ELSE 3 END;
        SET @dblock_key_byte = CASE @dblock_key_following WHEN 0 THEN @dblock_key_code
                                                          WHEN 1 THEN 192 + @dblock_key_code / 64
                                                          WHEN 2 THEN 224 + @dblock_key_code / 4096
                                                          ELSE        240 + @dblock_key_code / 262144 END;
        WHILE @dblock_key_following >= 0
        BEGIN
            SET @dblock_key_preimage = @dblock_key_preimage
                + SUBSTRING('0123456789ABCDEF', @dblock_key_byte / 16 + 1, 1)
                + SUBSTRING('0123456789ABCDEF', @dblock_key_byte % 16 + 1, 1);
            SET @dblock_key_bytes = @dblock_key_bytes + 1;
            SET @dblock_key_following = @dblock_key_following - 1;
            SET @dblock_key_byte = 128
                + @dblock_key_code / CASE @dblock_key_following WHEN 2 THEN 4096 WHEN 1 THEN 64 ELSE 1 END % 64;
        END;
    END;

    SET @dblock_key_flaw = CASE
        WHEN DATALENGTH(@dblock_key_text) = 0
            THEN N' is not set'
        WHEN @dblock_key_type COLLATE Latin1_General_BIN2 <> N'nvarchar'
            THEN CONCAT(N' is ', @dblock_key_type, N', in which the server may have changed letters; write N''...''')
        WHEN @dblock_key_bytes > 255
            THEN N' has more than 255 bytes in UTF-8'
        WHEN @dblock_key_flaw IS NULL AND @dblock_key_code = 32
            THEN N' begins or ends with a space'
        ELSE @dblock_key_flaw END;
    IF @dblock_key_refused IS NULL AND @dblock_key_flaw IS NOT NULL
        SET @dblock_key_refused = CONCAT(N'dblock.', CASE @dblock_key_field WHEN 1 THEN N'target' ELSE N'step' END,
                                         @dblock_key_flaw);
    IF @dblock_key_field = 1
        SET @dblock_key_preimage = @dblock_key_preimage + '1F';
    SET @dblock_key_field = @dblock_key_field + 1;
END;

IF @dblock_key_refused IS NULL
BEGIN
    -- Nothing but hexadecimal digits reaches the statement.
    SET @dblock_key_sql = CONCAT(N'SET @hash = HASHBYTES(''SHA2_256'', 0x', @dblock_key_preimage, N')');
    EXEC sys.sp_executesql @dblock_key_sql, N'@hash varbinary(32) OUTPUT', @hash = @dblock_key_hash OUTPUT;
    SET @dblock_key_value = CAST(SUBSTRING(@dblock_key_hash, 1, 8) AS bigint);
END;

SELECT
    @dblock_key_value AS [key],
    CASE WHEN @dblock_key_value IS NOT NULL THEN CONCAT(N'dblock:', @dblock_key_value) END AS resource,
    CASE WHEN @dblock_key_value IS NOT NULL THEN CONCAT(
        N'resource_type = N''APPLICATION'' AND resource_database_id = DB_ID()',
        N' AND CHARINDEX(N''[dblock:', @dblock_key_value, N']'', resource_description) > 0') END AS in_dm_tran_locks,
    CASE WHEN @dblock_key_value IS NOT NULL THEN CONCAT(
        N'SELECT APPLOCK_TEST(''public'', N''dblock:', @dblock_key_value, N''', ''Exclusive'', ''Session'')') END AS is_free,
    @dblock_key_refused AS refused;
