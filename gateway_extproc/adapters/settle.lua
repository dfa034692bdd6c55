-- Correct windows, once for each id however often it is sent.
--
-- KEYS[1]: the id's mark, KEYS[2..]: the windows. ARGV[1]: seconds for which the mark is kept. ARGV[2], doubles, little
-- endian, any number of: second, requests, then the tokens for each window. What is negative goes back to its second;
-- what is positive is charged to it (a second of 0, or one in the future, is the running one), unless that second has
-- left the window. Returns 1 if this call did it, 0 if an earlier one had.
--
-- Where budgets change, too: KEYS end with counters. ARGV[3], doubles: the number of windows, then any number of:
-- period (0: all that there are), unit, second, then the amount for each counter.

local windows, counters, last = {}, {}, #KEYS
local spend, first, deep
if ARGV[3] then
  spend = spending()
  last, first = struct.unpack('<d', ARGV[3])
  last = last + 1
  deep = 24 + 8 * (#KEYS - last)
end
local wide = 16 + 8 * (last - 1)
for i = 2, last do windows[i] = read(KEYS[i]) end -- before any write, so that a foreign key fails the whole call
for i = last + 1, #KEYS do counters[i] = spend.read(KEYS[i]) end

if not redis.call('SET', KEYS[1], 1, 'NX', 'EX', ARGV[1]) then return 0 end

for i = 2, last do
  local window = windows[i]
  local place = 1
  while place < #ARGV[2] do
    local second, requests = struct.unpack('<dd', ARGV[2], place)
    local tokens = within(struct.unpack('<d', ARGV[2], place + 8 * i), -MOST, MOST)
    requests = within(requests, -MOST, MOST)
    place = place + wide
    if (second == 0 or second > window.second) and requests >= 0 and tokens >= 0 then second = window.second end
    if second > window.second - SLOTS then add(window, second, requests, tokens) end
  end
  write(KEYS[i], window)
end
for i = last + 1, #KEYS do
  local at = first
  while at < #ARGV[3] do
    local period, unit, second = struct.unpack('<ddd', ARGV[3], at)
    spend.change(counters[i], unit, period, second, (struct.unpack('<d', ARGV[3], at + 16 + 8 * (i - last))))
    at = at + deep
  end
  spend.write(KEYS[i], counters[i])
end
return 1
