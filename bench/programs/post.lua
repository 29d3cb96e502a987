-- wrk: POST a new UUID version 1 each time. After "--": a seed, and the mean pause of a connection in milliseconds.
local pause = 0

init = function(args)
  math.randomseed(tonumber(args[1]))
  pause = tonumber(args[2])
  if pause > 0 then
    delay = function() return math.random(0, 2 * math.floor(pause)) end
  end
end

request = function()
  local id = string.format("%08x-%04x-11e5-ad75-%012x", math.random(0, 0x7fffffff), math.random(0, 0xffff), math.random(0, 0x7fffffff))
  return wrk.format("POST", "/widgets", {["Content-Type"] = "application/json"}, '{"widget_id": "' .. id .. '"}')
end

done = function(summary, latency, requests)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format('{"per_s": %f, "p50_ms": %f, "p99_ms": %f, "errors": %d}\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, failed))
end
