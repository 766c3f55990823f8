-- How many of a prompt's leading blocks each worker holds.
-- KEYS: a set of block names per worker. ARGV: the prompt's block names joined; bytes of one name.
-- Returns one count per key.
--
-- Bisects, which is right because the sets are prefix-closed: who holds a block holds those before it. Where one is
-- not, the count is off, and that costs a cache miss. pcall: a key of another type counts as empty.
local names, width = ARGV[1], tonumber(ARGV[2])
local total = math.floor(#names / width)

local function holds(key, i)
    return redis.pcall('SISMEMBER', key, string.sub(names, (i - 1) * width + 1, i * width)) == 1
end

local counts = {}
for k, key in ipairs(KEYS) do
    local low, high = 0, 0
    if total > 0 and holds(key, 1) then -- most workers have nothing of a prompt: one look settles it
        low, high = 1, total
    end
    while low < high do -- the first `low` are held; none behind `high` is
        local middle = math.floor((low + high + 1) / 2)
        if holds(key, middle) then
            low = middle
        else
            high = middle - 1
        end
    end
    counts[k] = low
end
return counts
