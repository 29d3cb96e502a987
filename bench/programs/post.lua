-- wrk: POST each id of $BENCH_IDS once; then only ask for the maker's health, until it is stopped.
local ids = {}
for id in io.lines(os.getenv("BENCH_IDS")) do ids[#ids + 1] = id end
local at = -1  -- wrk throws away what the first call gives

request = function()
  at = at + 1
  if not ids[at] then return wrk.format("GET", "/healthz") end
  return wrk.format("POST", "/widgets", {["Content-Type"] = "application/json"}, '{"widget_id": "' .. ids[at] .. '"}')
end
