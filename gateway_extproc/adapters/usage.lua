-- Add sums to those of an hour.
--
-- KEYS[1]: the hash of an hour. ARGV[1]: seconds for which it is kept, ARGV[2]: most groups, ARGV[3]: the group that
-- stands for those that find no room, then a group and its sums (6 numbers of 8 bytes, little endian), over and over.

local FORM = '<I8I8I8I8I8I8'
local room = tonumber(ARGV[2]) - redis.call('HLEN', KEYS[1])

for at = 4, #ARGV, 2 do
  local group = ARGV[at]
  local there = redis.call('HGET', KEYS[1], group)
  if not there then
    if room < 1 then
      group = ARGV[3]
      there = redis.call('HGET', KEYS[1], group)
    end
    if not there then room = room - 1 end
  end
  local sums = ARGV[at + 1]
  if there then
    local had, more = {struct.unpack(FORM, there)}, {struct.unpack(FORM, sums)}
    sums = struct.pack(FORM, had[1] + more[1], had[2] + more[2], had[3] + more[3], had[4] + more[4], had[5] + more[5],
      had[6] + more[6])
  end
  redis.call('HSET', KEYS[1], group, sums)
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return redis.call('HLEN', KEYS[1])
