-- All worker records, and the epoch by which a reader sees that Redis lost its data.
-- KEYS: index of ids; epoch. ARGV: what stands before an id in a record's key; most bytes of a record; most workers;
-- the epoch to set if there is none.
-- Returns {epoch, id, record, id, record, ...}; a record of one byte too many was longer, one of none was no string.
-- Ids without a record leave the index: their lease ran out. A live worker puts its own back at each heartbeat.
local max_bytes, max_workers = tonumber(ARGV[2]), tonumber(ARGV[3])

redis.pcall('SET', KEYS[2], ARGV[4], 'NX')
redis.pcall('EXPIRE', KEYS[2], 3600) -- a system that is gone leaves nothing behind
local epoch = redis.pcall('GET', KEYS[2])
if type(epoch) ~= 'string' then
    epoch = ''
end

local ids = redis.pcall('SRANDMEMBER', KEYS[1], max_workers) -- distinct; all of them unless there are more
if ids.err then
    ids = {}
end
local reply = {epoch}
for _, id in ipairs(ids) do
    local record = redis.pcall('GETRANGE', ARGV[1] .. id, 0, max_bytes)
    if record == '' then
        redis.pcall('SREM', KEYS[1], id)
    else
        reply[#reply + 1] = id
        reply[#reply + 1] = type(record) == 'string' and record or ''
    end
end
return reply
