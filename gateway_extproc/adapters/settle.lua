-- Correct windows, once for each id however often it is sent.
--
-- KEYS[1]: the id's mark, KEYS[2..]: the windows. ARGV[1]: seconds for which the mark is kept. ARGV[2], doubles, little
-- endian, any number of: second, requests, tokens. What is negative goes back to its second; what is positive is
-- charged to it (a second of 0, or one in the future, is the running one), unless that second has left the window.
-- Returns 1 if this call did it, 0 if an earlier one had.

local windows = {}
for i = 2, #KEYS do windows[i] = read(KEYS[i]) end -- before any write, so that a foreign key fails the whole call

if not redis.call('SET', KEYS[1], 1, 'NX', 'EX', ARGV[1]) then return 0 end

for i = 2, #KEYS do
  local window = windows[i]
  local place = 1
  while place < #ARGV[2] do
    local second, requests, tokens
    second, requests, tokens, place = struct.unpack('<ddd', ARGV[2], place)
    requests = within(requests, -MOST, MOST)
    tokens = within(tokens, -MOST, MOST)
    if (second == 0 or second > window.second) and requests >= 0 and tokens >= 0 then second = window.second end
    if second > window.second - SLOTS then add(window, second, requests, tokens) end
  end
  write(KEYS[i], window)
end
return 1
