-- Give back an admission whose caller never heard of it, whether it was taken, is on its way or got lost.
--
-- KEYS[1]: the admission's mark, KEYS[2..]: its windows. ARGV[1]: its tokens. ARGV[2]: seconds for which the undoing is
-- remembered: longer than a question can lie in a socket of a server that stands still. Returns 1 if it was taken.

local windows = {}
for i = 2, #KEYS do windows[i] = read(KEYS[i]) end -- before any write, so that a foreign key fails the whole call

local taken = redis.call('GET', KEYS[1])
if taken == 'void' then return 0 end
redis.call('SET', KEYS[1], 'void', 'EX', ARGV[2])
if not taken then return 0 end

local tokens = within(tonumber(ARGV[1]), 0, MOST)
for i = 2, #KEYS do
  add(windows[i], tonumber(taken), -1, -tokens)
  write(KEYS[i], windows[i])
end
return 1
