-- Give back an admission whose caller never heard of it, whether it was taken, is on its way or got lost.
--
-- KEYS[1]: the admission's mark, KEYS[2..]: its windows. ARGV[1], doubles: the tokens for each. ARGV[2]: seconds for which the undoing is
-- remembered: longer than a question can lie in a socket of a server that stands still. Returns 1 if it was taken.
--
-- Where it may have taken leases or of budgets: KEYS end with those leases, then those counters. ARGV[3], doubles: the
-- number of windows, that of leases, then tokens and cost for each counter. ARGV[4]: the admission's id.

local windows, counters, last, first = {}, {}, #KEYS, #KEYS + 1 -- the last window, the first of the counters
local spend
if ARGV[3] then
  local leases
  spend = spending()
  last, leases = struct.unpack('<dd', ARGV[3])
  last = last + 1
  first = last + leases + 1
end
for i = 2, last do windows[i] = read(KEYS[i]) end -- before any write, so that a foreign key fails the whole call
for i = last + 1, first - 1 do spend.held(KEYS[i]) end
for i = first, #KEYS do counters[i] = spend.read(KEYS[i]) end

local taken = redis.call('GET', KEYS[1])
if taken == 'void' then return 0 end
redis.call('SET', KEYS[1], 'void', 'EX', ARGV[2])
if not taken then return 0 end

for i = 2, last do
  add(windows[i], tonumber(taken), -1, -within(struct.unpack('<d', ARGV[1], 8 * i - 15), 0, MOST))
  write(KEYS[i], windows[i])
end
for i = last + 1, first - 1 do redis.call('ZREM', KEYS[i], ARGV[4]) end
for i = first, #KEYS do
  local tokens, cost = struct.unpack('<dd', ARGV[3], 17 + 16 * (i - first))
  spend.change(counters[i], 0, 0, tonumber(taken), -tokens)
  spend.change(counters[i], 1, 0, tonumber(taken), -cost)
  spend.write(KEYS[i], counters[i])
end
return 1
