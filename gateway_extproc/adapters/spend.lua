-- Budgets and leases: core/budget.py and core/lease.py in Redis. Put behind window.lua, in front of every script that
-- counts. A call that is not about them pays for none of this: `spending` makes it when it is called.
--
-- Budgets of a window are one string: an entry of 16 bytes for each counter, little endian: unit (1 byte: 0 tokens,
-- 1 usd), period (4, signed: seconds, or -1 week, -2 month), the first second that is counted (4), used (7). The
-- leases of a window are a sorted set: ids by the second in which they end.

local function spending()
  local FORM, WIDTH, DAY, WEEK, MONTH, COUNTERS = '<Bi4I4I7', 16, 86400, -1, -2, 32
  local EXACT = 2 ^ 53 - 1
  local KEPT = 3600 -- seconds beyond the end of its period for which a counter waits for what is settled late
  local floor, max = math.floor, math.max
  local own = {EXACT = EXACT, MEMORY = 300} -- a mark lasts as long as an undoing may be sent again

  -- The day (since 1970) on which the month of `day` began: civil_from_days of Howard Hinnant's "chrono-Compatible
  -- Low-Level Date Algorithms", which counts from 1 March 0000 in eras of 400 years.
  local function first_of_month(day)
    local of_era = (day + 719468) % 146097
    local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    local month = floor((5 * of_year + 2) / 153)
    return day - (of_year - floor((153 * month + 2) / 5))
  end

  -- The first second of the period in which `second` lies, and of the next one.
  local function bounds(period, second)
    if period > 0 then
      local start = second - second % period
      return start, start + period
    end
    local day = floor(second / DAY)
    if period == WEEK then
      local monday = day - (day + 3) % 7 -- 1970 began on a Thursday
      return monday * DAY, (monday + 7) * DAY
    elseif period == MONTH then
      local first = first_of_month(day)
      return first * DAY, first_of_month(first + 31) * DAY
    end
    error('not a budget')
  end
  own.bounds = bounds

  -- A counter of what is spent from `since` on, with the period that runs: a clock that stepped back stands still.
  local function count(unit, period, since, used)
    local start, stop = bounds(period, max(now, since))
    return {unit = unit, period = period, since = since, used = used, start = start, stop = stop}
  end

  local function runs(counter)
    return counter.since >= counter.start
  end

  -- The counters under `key`, in their order. Anything else there is an error.
  function own.read(key)
    local raw, counters = redis.call('GET', key) or '', {}
    for place = 1, #raw, WIDTH do
      counters[#counters + 1] = count(struct.unpack(FORM, raw, place))
    end
    return counters
  end

  function own.write(key, counters)
    local entries, stop = {}, now
    for i, counter in ipairs(counters) do
      entries[i] = struct.pack(FORM, counter.unit, counter.period, counter.since, counter.used)
      stop = max(stop, runs(counter) and counter.stop or select(2, bounds(counter.period, counter.since)))
    end
    if #entries > 0 then redis.call('SET', key, table.concat(entries), 'EX', stop - now + KEPT) end
  end

  local function find(counters, unit, period)
    for _, counter in ipairs(counters) do
      if counter.unit == unit and counter.period == period then return counter end
    end
  end

  -- What was spent of a budget in its running period, and when that ends.
  function own.used(counters, unit, period)
    local counter = find(counters, unit, period)
    if not counter then return 0, select(2, bounds(period, now)) end
    return runs(counter) and counter.used or 0, counter.stop
  end

  -- Spend in the running period, in the budgets' counters and in others that run. Amounts by unit; the new counters.
  function own.take(counters, budgets, amounts)
    local kept = {}
    for _, budget in ipairs(budgets) do
      if not find(kept, budget.unit, budget.period) then
        local counter = find(counters, budget.unit, budget.period)
        if not counter or not runs(counter) then
          counter = count(budget.unit, budget.period, now, 0)
        end
        kept[#kept + 1] = counter
      end
    end
    for _, counter in ipairs(counters) do
      if #kept < COUNTERS and runs(counter) and not find(kept, counter.unit, counter.period) then
        kept[#kept + 1] = counter
      end
    end
    for _, counter in ipairs(kept) do
      counter.used = math.min(counter.used + amounts[counter.unit], EXACT)
    end
    return kept
  end

  -- Add what was spent in `second` (0, or one to come: the running one) to a counter, or take from it.
  local function change(counter, second, amount)
    local running = max(now, counter.since)
    if amount < 0 then
      if second >= max(counter.start, counter.since) and second <= running then
        counter.used = max(counter.used + amount, 0)
      end
      return
    end
    local at = running
    if second ~= 0 then at = math.min(second, running) end
    if amount == 0 or at < counter.start then return end
    if not runs(counter) then counter.since, counter.used = at, 0 end
    counter.since = math.min(counter.since, at)
    counter.used = math.min(counter.used + amount, EXACT)
  end

  -- The same to all counters of a unit (`period` 0), or to one, which is made where it is not there.
  function own.change(counters, unit, period, second, amount)
    amount = within(amount, -EXACT, EXACT)
    if period == 0 then
      for _, counter in ipairs(counters) do
        if counter.unit == unit then change(counter, second, amount) end
      end
      return
    end
    local counter = find(counters, unit, period)
    if not counter then
      if amount <= 0 or second < (bounds(period, now)) or #counters >= COUNTERS then return end
      counter = count(unit, period, now, 0)
      counters[#counters + 1] = counter
    end
    change(counter, second, amount)
  end

  function own.held(key)
    return redis.call('ZCOUNT', key, '(' .. now, '+inf')
  end

  function own.lend(key, id, seconds)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    redis.call('ZADD', key, now + seconds, id)
    redis.call('EXPIRE', key, seconds + 1)
  end

  return own
end
