-- Write one document, its line in the audit list, and the news of it; or change nothing.
--
-- KEYS[1]: the hash of all documents of a kind, KEYS[2]: the audit list, KEYS[3]: the stream of changes. ARGV: the
-- document's name, the version that is expected ('*': whichever, '': none, '-': no matter), the document ('': delete
-- it), the audit entry, how many of those are kept, the change, how many of those are kept. Returns 'ok', or what follows
-- a '!': the version that is there.

local there = redis.call('HGET', KEYS[1], ARGV[1])
local version = there and redis.sha1hex(there) or ''
local expected = ARGV[2]
if expected ~= '-' and expected ~= version and not (expected == '*' and there) then return '!' .. version end
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
redis.call('LPUSH', KEYS[2], ARGV[4])
redis.call('LTRIM', KEYS[2], 0, ARGV[5] - 1)
redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[7], '*', 'change', ARGV[6])
return 'ok'
