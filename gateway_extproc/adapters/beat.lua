-- Say that a gateway lives, and learn how many do.
--
-- KEYS[1]: the sorted set of gateways by their last beat (unix seconds). ARGV[1]: this gateway. ARGV[2]: seconds after
-- which a silent one no longer counts. Returns how many live and the time in microseconds.

local clock = redis.call('TIME')
local now = tonumber(clock[1])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. (now - tonumber(ARGV[2])))
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {redis.call('ZCARD', KEYS[1]), now * 1000000 + tonumber(clock[2])}
