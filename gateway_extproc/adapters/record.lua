-- Write documents, their entries in the audit list, and the news of them; or change nothing.
--
-- KEYS[1]: the hash of all documents of a kind, KEYS[2]: the audit list, KEYS[3]: the stream of changes. ARGV: how many
-- audit entries are kept, the change, how many of those are kept; then for each document its name, the version that is
-- expected ('*': whichever, '': none, '-': no matter), its text ('': delete it) and its audit entry. Returns 'ok', or of
-- the first that is not as expected its place, from 0, a '!', and the version that is there.

for at = 4, #ARGV, 4 do
  local there = redis.call('HGET', KEYS[1], ARGV[at])
  local version = there and redis.sha1hex(there) or ''
  local expected = ARGV[at + 1]
  if expected ~= '-' and expected ~= version and not (expected == '*' and there) then
    return (at - 4) / 4 .. '!' .. version
  end
end
for at = 4, #ARGV, 4 do
  if ARGV[at + 2] == '' then
    redis.call('HDEL', KEYS[1], ARGV[at])
  else
    redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 2])
  end
  redis.call('LPUSH', KEYS[2], ARGV[at + 3])
end
redis.call('LTRIM', KEYS[2], 0, ARGV[1] - 1)
redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[3], '*', 'change', ARGV[2])
return 'ok'
