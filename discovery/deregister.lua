-- Takes a worker's record back, unless a later incarnation's has replaced it, and its block set in any case.
-- KEYS: record; index of ids; block set. ARGV: the record as it was written; the worker's id.
redis.call('UNLINK', KEYS[3])
if redis.pcall('GET', KEYS[1]) == ARGV[1] then
    redis.call('UNLINK', KEYS[1])
    redis.pcall('SREM', KEYS[2], ARGV[2])
end
return 1
