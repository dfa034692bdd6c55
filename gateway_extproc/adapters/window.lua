-- The sliding window of core/window.py as one Redis string. Put in front of every script that counts.
--
-- Form (little endian): total requests (8 bytes), total tokens (8), then one entry for each second in which something
-- was spent, oldest first: second (4), requests (6), tokens (6). At most 61 entries, so at most 992 bytes.
-- The time is Redis's own. Amounts are clamped to MOST, so sums stay exact in a double.

local SLOTS, WIDTH, ENTRY, HEADER, MOST = 61, 16, '<I4I6I6', '<I8I8', 2 ^ 40
local TTL = SLOTS + 1 -- a second more than the newest slot can live; idle users vanish

local clock = redis.call('TIME')
local now = tonumber(clock[1])
local now_us = now * 1000000 + tonumber(clock[2])

local function within(amount, least, most)
  if amount ~= amount then return 0 end
  return math.min(math.max(amount, least), most)
end

-- The window under `key` without what has left it. `second` is the running one; a clock that stepped back stands still.
local function read(key)
  local raw = redis.call('GET', key)
  local window = {entries = '', requests = 0, tokens = 0, second = now}
  if not raw or #raw <= WIDTH then return window end
  local place = WIDTH + 1
  window.requests, window.tokens = struct.unpack(HEADER, raw)
  while place <= #raw do
    local second, requests, tokens = struct.unpack(ENTRY, raw, place)
    if second > now - SLOTS then break end
    window.requests = window.requests - requests
    window.tokens = window.tokens - tokens
    place = place + WIDTH
  end
  if place <= #raw then
    window.entries = string.sub(raw, place)
    window.second = math.max(now, (struct.unpack('<I4', raw, #raw - WIDTH + 1)))
  end
  return window
end

-- Change one slot: positive amounts make it, negative ones take from it down to zero, an empty one goes.
local function add(window, second, requests, tokens)
  local entries = window.entries
  local place = #entries - WIDTH + 1
  local at, had_requests, had_tokens
  while place > 0 do
    at, had_requests, had_tokens = struct.unpack(ENTRY, entries, place)
    if at <= second then break end
    place = place - WIDTH
  end
  local rest = place + WIDTH
  if place < 1 or at ~= second then
    if requests <= 0 and tokens <= 0 then return end
    place, had_requests, had_tokens = rest, 0, 0
  end
  local has_requests = within(had_requests + requests, 0, MOST)
  local has_tokens = within(had_tokens + tokens, 0, MOST)
  local entry = ''
  if has_requests > 0 or has_tokens > 0 then entry = struct.pack(ENTRY, second, has_requests, has_tokens) end
  window.entries = string.sub(entries, 1, place - 1) .. entry .. string.sub(entries, rest)
  window.requests = window.requests + has_requests - had_requests
  window.tokens = window.tokens + has_tokens - had_tokens
end

local function write(key, window)
  if window.entries == '' then
    redis.call('DEL', key)
  else
    local header = struct.pack(HEADER, window.requests, window.tokens)
    redis.call('SET', key, header .. window.entries, 'EX', TTL)
  end
end
