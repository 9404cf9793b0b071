#!lua name=psa_store

-- The fence and the flip. Functions check everything first and write last, because Redis isolates them but does not
-- roll them back. They move small values only: tensors are plain keys. Terms are fixed-width hex, compared as text.

local DROPPED_EXPIRY_S = 300

-- Remove what lies at one of our keys and is of another type: another program wrote it.
local function remove_foreign(key, kind)
  local is = redis.call('TYPE', key).ok
  if is == kind or is == 'none' then return nil end
  redis.call('UNLINK', key)
  return is
end

-- The term that owns a head. What is no term was not written by a seal, and owns nothing.
local function term_of(head)
  local now = redis.call('HGET', head, 'term')
  return now and #now == 16 and not string.find(now, '[^0-9a-f]') and now or nil
end

-- psa_seal: raise the term of a shard, so that commits of lower terms are refused from now on.
-- keys: head. args: term, layout fingerprint[, a term that is too high to be one].
-- returns {'ok', fields of the head} or refuses with {'fenced', higher term}. Idempotent.
local function seal(keys, args)
  local now = term_of(keys[1])
  if now and now > args[1] and not (args[3] and now >= args[3]) then return {'fenced', now} end
  redis.call('HSET', keys[1], 'term', args[1])
  local layout = redis.call('HGET', keys[1], 'layout')
  if not layout or #layout ~= 64 or string.find(layout, '[^0-9a-f]') then
    redis.call('HSET', keys[1], 'layout', args[2])
  end
  return {'ok', redis.call('HGETALL', keys[1])}
end

-- psa_remove_foreign: keys: one of ours. args: the type that it must have. returns the other one that it had, or nil.
local function remove_foreign_key(keys, args)
  return remove_foreign(keys[1], args[1])
end

-- Why the caller may not change this head: its term is not the one that owns it. nil if it is.
local function refusal_of(head, term)
  local now = term_of(head)
  if not now or now < term then return {'rewound', now or ''} end
  if now > term then return {'fenced', now} end
  return nil
end

-- The nonce of a manifest; nil if the text is none.
local function nonce_of(manifest)
  local ok, found = pcall(cjson.decode, manifest)
  return ok and type(found) == 'table' and found.nonce or nil
end

-- Whether the head is the one that the caller has read: args, from `at` on, say how many fields it has besides term and
-- layout, and name and nonce of each ('' for one that could not be read). The name alone does not tell: the same
-- version may have been written again since, and a call whose connection broke may still arrive after that. Returns
-- where the next argument is, or nil.
local function unchanged(head, args, at)
  local seen = tonumber(args[at])
  local others = redis.call('HEXISTS', head, 'term') + redis.call('HEXISTS', head, 'layout')
  if redis.call('HLEN', head) ~= seen + others then return nil end
  for i = at + 1, at + 2 * seen, 2 do
    local manifest = redis.call('HGET', head, args[i])
    if not manifest or args[i + 1] ~= '' and nonce_of(manifest) ~= args[i + 1] then return nil end
  end
  return at + 2 * seen + 1
end

-- psa_commit: write one field of a head (a version, or a pin, which needs no new chunks), and drop old ones, in one
-- step. Their chunks expire; a caller that has the time removes them earlier with psa_sweep.
-- keys: head, then the new chunks, then the chunks to drop.
-- args: term, field, manifest, field that must be there ('' for none), number of new chunks, their sizes (that many),
--       the head as it was read (see unchanged), then the fields to drop.
-- returns {'ok'}; refuses with {'fenced', term}, {'rewound', what}, {'missing', key} or {'changed'} if the head
-- is not the one that the caller has read.
local function commit(keys, args)
  local head, term, field, manifest, expect = keys[1], args[1], args[2], args[3], args[4]
  local refusal = refusal_of(head, term)
  if refusal then return refusal end
  if expect ~= '' and redis.call('HEXISTS', head, expect) == 0 then return {'rewound', expect} end
  local count = tonumber(args[5])
  for i = 1, count do
    if redis.call('STRLEN', keys[1 + i]) ~= tonumber(args[5 + i]) then return {'missing', keys[1 + i]} end
  end
  local gone = unchanged(head, args, 6 + count)
  if not gone then return {'changed'} end
  for i = 1, count do redis.call('PERSIST', keys[1 + i]) end
  for i = gone, #args do redis.call('HDEL', head, args[i]) end
  redis.call('HSET', head, field, manifest)
  for i = 2 + count, #keys do redis.call('EXPIRE', keys[i], DROPPED_EXPIRY_S) end
  return {'ok'}
end

-- psa_sweep: remove chunks before they expire. keys: the chunks. returns how many it removed. Idempotent.
-- What a head names does not expire: so a Redis that went back in time keeps what its older head still needs.
local function sweep(keys)
  local gone = 0
  for _, key in ipairs(keys) do
    if redis.call('PTTL', key) >= 0 then gone = gone + redis.call('UNLINK', key) end
  end
  return gone
end

-- psa_drop: take fields out of a head.
-- keys: head, then the chunks that only they name. args: term, the head as it was read (see unchanged), the fields.
-- returns {'ok'}; refuses with {'fenced', term}, {'rewound', term}, or {'changed'}, also if it was done already.
local function drop(keys, args)
  local refusal = refusal_of(keys[1], args[1])
  if refusal then return refusal end
  local gone = unchanged(keys[1], args, 2)
  if not gone then return {'changed'} end
  for i = gone, #args do redis.call('HDEL', keys[1], args[i]) end
  for i = 2, #keys do redis.call('UNLINK', keys[i]) end
  return {'ok'}
end

-- psa_create: store a job's documents unless it has some. keys: config, layout. args: the same.
-- returns the stored documents {config, layout}. The first writer wins.
local function create(keys, args)
  for _, key in ipairs(keys) do remove_foreign(key, 'string') end
  if redis.call('EXISTS', keys[1]) == 0 then
    redis.call('SET', keys[2], args[2])
    redis.call('SET', keys[1], args[1])
  end
  return {redis.call('GET', keys[1]), redis.call('GET', keys[2])}
end

-- psa_replace: store a document in the place of the one that the caller has read. keys: the document[, a head].
-- args: that one ('' for none), the new one[, the term that must own the head]. returns {'ok'}, or {'changed'} if
-- another is stored; refuses with {'fenced', term}. Idempotent.
local function replace(keys, args)
  remove_foreign(keys[1], 'string')
  local now = redis.call('GET', keys[1]) or ''
  if now == args[2] then return {'ok'} end
  if now ~= args[1] then return {'changed'} end
  local refusal = keys[2] and refusal_of(keys[2], args[3])
  if refusal then return refusal end
  redis.call('SET', keys[1], args[2])
  return {'ok'}
end

-- psa_digest: keys: a document. returns the SHA-1 of its text, '' if there is none.
local function digest(keys)
  remove_foreign(keys[1], 'string')
  local found = redis.call('GET', keys[1])
  return found and redis.sha1hex(found) or ''
end

local EVENTS_COMPARED = 64
local POINT_EARLY_MS = 500
local INTERVAL_MAX_S = 2 ^ 20

-- psa_event: add an event to a stream, unless the same is among its newest: then an answer was lost. keys: stream.
-- args: the event, how many to keep. returns 1 if it was added. Idempotent.
local function event(keys, args)
  remove_foreign(keys[1], 'stream')
  for _, entry in ipairs(redis.call('XREVRANGE', keys[1], '+', '-', 'COUNT', EVENTS_COMPARED)) do
    if entry[2][2] == args[1] then return 0 end
  end
  redis.call('XADD', keys[1], 'MAXLEN', '=', args[2], '*', 'json', args[1])
  return 1
end

-- psa_point: add a point to a curve if its interval has passed since the newest, by the clock of Redis. When there are
-- too many, every other one goes, but for the first and the last, and the interval doubles.
-- keys: stream, interval in seconds. args: the point, how many to keep. returns 1 if it was added. Idempotent.
local function point(keys, args)
  remove_foreign(keys[1], 'stream')
  remove_foreign(keys[2], 'string')
  local interval_s = tonumber(redis.call('GET', keys[2]) or 1)
  if not interval_s or not (interval_s >= 1 and interval_s <= INTERVAL_MAX_S) then interval_s = 1 end
  local newest = redis.call('XREVRANGE', keys[1], '+', '-', 'COUNT', 1)[1]
  if newest then
    local time = redis.call('TIME')
    local passed_ms = time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(string.match(newest[1], '^%d+'))
    if passed_ms >= 0 and passed_ms < interval_s * 1000 - POINT_EARLY_MS then return 0 end
  end
  redis.call('XADD', keys[1], '*', 'json', args[1])
  if redis.call('XLEN', keys[1]) > tonumber(args[2]) then
    local entries = redis.call('XRANGE', keys[1], '-', '+')
    for i = 2, #entries - 1, 2 do redis.call('XDEL', keys[1], entries[i][1]) end
    redis.call('SET', keys[2], interval_s * 2)
  end
  return 1
end

redis.register_function('psa_event', event)
redis.register_function('psa_point', point)
redis.register_function('psa_seal', seal)
redis.register_function('psa_commit', commit)
redis.register_function{function_name = 'psa_sweep', callback = sweep, flags = {'allow-oom'}}
redis.register_function('psa_drop', drop)
-- These take no memory, so a Redis that is full answers them as well.
redis.register_function{function_name = 'psa_remove_foreign', callback = remove_foreign_key, flags = {'allow-oom'}}
redis.register_function{function_name = 'psa_digest', callback = digest, flags = {'allow-oom'}}
redis.register_function('psa_create', create)
redis.register_function('psa_replace', replace)
