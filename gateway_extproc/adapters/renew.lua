-- Lengthen leases that are there. A foreign key stands in no other's way.
--
-- KEYS: the leases of a window, once for each id. ARGV[1]: seconds for which they last from now. ARGV[2..]: the ids.

local now = tonumber(redis.call('TIME')[1])
local seconds = tonumber(ARGV[1])
for i, key in ipairs(KEYS) do
  redis.pcall('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.pcall('ZADD', key, 'XX', 'GT', now + seconds, ARGV[i + 1])
  redis.pcall('EXPIRE', key, seconds + 1)
end
return #KEYS
