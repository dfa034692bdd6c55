-- Check one request against all its windows, then take it from all of them; a refusal writes nothing.
--
-- KEYS[1]: the admission's mark, KEYS[2..]: its windows. ARGV[1], doubles, little endian: the tokens for each window,
-- then for each rpm and tpm (negative: no limit). Returns bytes: outcome (1 admitted, 0 denied, 2 void), index of the window that
-- lacks, what it lacks (0 rpm, 1 tpm, 2 concurrency, 3 budget), then doubles: the second of the admission or the
-- microseconds to wait (negative: never), and for each window requests, tokens and the microseconds until each is zero.
--
-- Where any window limits more than that: KEYS end with, for each window in turn, its leases if it limits concurrency
-- and its counters if it has budgets. ARGV[2], doubles: the cost for each window, seconds for which a lease lasts, then
-- for each window concurrency (negative: no limit) and the number of its budgets, then unit, period and amount of each.
-- ARGV[3]: the admission's id. Where it lacks one of these, the answer ends with the index of the budget (1 byte) and what is used
-- of it, or runs (double).
--
-- `looks`, said in front of this: whether to answer only, and take nothing.
--
-- The mark says that this admission was taken and when, so undo.lua can tell; where undo.lua came first, the mark
-- says so, and this question, whose caller is gone, takes nothing.

local count = #ARGV[1] / 24
local windows, tokens, last, place, mark_ttl = {}, {}, 1 + count, 1 + 8 * count, TTL
local lacking, kind, impossible, wait_us = nil, 0, false, 0
local spend, check, take, budget, used

-- Microseconds until `window` has room for what is over, oldest slots leaving first.
local function wait(window, requests_over, tokens_over)
  local at = 1
  local second, requests, spent
  while (requests_over > 0 or tokens_over > 0) and at < #window.entries do
    second, requests, spent = struct.unpack(ENTRY, window.entries, at)
    requests_over = requests_over - requests
    tokens_over = tokens_over - spent
    at = at + WIDTH
  end
  if not second then return 0 end
  return (second + SLOTS) * 1000000 - now_us
end

if ARGV[2] then
  spend = spending()
  local lease, at = struct.unpack('<d', ARGV[2], 1 + 8 * count)
  local more, key = {}, last

  local function lacks(i, what, never, us, index, spent)
    if not lacking or (never and not impossible) then lacking, kind, budget, used = i - 2, what, index, spent end
    if never then impossible = true else wait_us = math.max(wait_us, us) end
  end

  -- What the window lacks beside requests and tokens of a minute.
  function check(i)
    local concurrency, budgets
    local cost = within(struct.unpack('<d', ARGV[2], 8 * i - 15), 0, spend.EXACT)
    local amounts = {[0] = tokens[i], [1] = cost}
    local own = {budgets = {}, amounts = amounts}
    more[#more + 1] = own
    concurrency, budgets, at = struct.unpack('<dd', ARGV[2], at)
    if concurrency >= 0 then
      key = key + 1
      own.leases = KEYS[key]
      local held = spend.held(own.leases)
      if held + 1 > concurrency then lacks(i, 2, concurrency < 1, 1000000, 0, held) end
    end
    if budgets > 0 then
      key = key + 1
      own.key, own.counters = KEYS[key], spend.read(KEYS[key])
      mark_ttl = spend.MEMORY -- what a counter took is worth giving back for longer than a window lasts
    end
    for index = 0, budgets - 1 do
      local unit, period, amount
      unit, period, amount, at = struct.unpack('<ddd', ARGV[2], at)
      own.budgets[index + 1] = {unit = unit, period = period}
      local spent, ends = spend.used(own.counters, unit, period)
      if amount < 1 or spent + amounts[unit] > amount then
        lacks(i, 3, amount < 1 or amounts[unit] > amount, ends * 1000000 - now_us, index, spent)
      end
    end
  end

  function take()
    for _, own in ipairs(more) do
      if own.leases then spend.lend(own.leases, ARGV[3], lease) end
      if own.key then spend.write(own.key, spend.take(own.counters, own.budgets, own.amounts)) end
    end
  end
end

for i = 2, last do
  local window = read(KEYS[i])
  local asked = within(struct.unpack('<d', ARGV[1], 8 * i - 15), 0, MOST)
  local rpm, tpm
  rpm, tpm, place = struct.unpack('<dd', ARGV[1], place)
  tokens[i] = asked
  local requests_over, tokens_over = 0, 0
  if rpm >= 0 then requests_over = window.requests + 1 - rpm end
  if tpm >= 0 then tokens_over = window.tokens + asked - tpm end
  if requests_over > 0 or tokens_over > 0 then
    local never = (rpm >= 0 and rpm < 1) or (tpm >= 0 and asked > tpm)
    if not lacking or (never and not impossible) then
      lacking = i - 2
      kind = 1
      if (not never and requests_over > 0) or (never and rpm >= 0 and rpm < 1) then kind = 0 end
    end
    if never then
      impossible = true
    else
      wait_us = math.max(wait_us, wait(window, requests_over, tokens_over))
    end
  end
  windows[i] = window
  if spend then check(i) end
end

local outcome, value = 1, now
if lacking then
  outcome, value = 0, wait_us
  if impossible then value = -1 end
elseif not looks and not redis.call('SET', KEYS[1], now, 'NX', 'EX', mark_ttl) then
  return struct.pack('<BBBd', 2, 0, 0, 0)
end

if outcome == 1 and not looks and take then take() end
local reply = {struct.pack('<BBBd', outcome, lacking or 0, kind, value)}
for i = 2, last do
  local window = windows[i]
  if outcome == 1 and not looks then
    add(window, window.second, 1, tokens[i])
    write(KEYS[i], window)
  end
  local requests_reset, tokens_reset = 0, 0
  local at = #window.entries - WIDTH + 1
  while at > 0 and (requests_reset == 0 or tokens_reset == 0) do
    local second, requests, spent = struct.unpack(ENTRY, window.entries, at)
    local left = (second + SLOTS) * 1000000 - now_us
    if requests > 0 and requests_reset == 0 then requests_reset = left end
    if spent > 0 and tokens_reset == 0 then tokens_reset = left end
    at = at - WIDTH
  end
  reply[i] = struct.pack('<dddd', window.requests, window.tokens, requests_reset, tokens_reset)
end
if outcome == 0 and kind > 1 then reply[last + 1] = struct.pack('<Bd', budget, used) end
return table.concat(reply)
