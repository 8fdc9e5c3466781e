-- wrk: one body, models m0 ... mN-1 (suffix given) in a fixed stride, made before the load starts.
-- Arguments: BODY_FILE COUNT SUFFIX CONTENT_TYPE PATH [HEADER VALUE]...; {model} in PATH and VALUE is the model's name
local requests, stride, n = {}, 7, 0
function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.body, wrk.method = file:read("*a"), "POST"
  file:close()
  local count = tonumber(args[2])
  if count % stride == 0 then stride = 1 end -- else some models would never have their turn
  wrk.headers["Content-Type"] = args[4]
  for i = 0, count - 1 do
    local model = "m" .. i .. args[3]
    for at = 6, #args, 2 do
      wrk.headers[args[at]] = args[at + 1]:gsub("{model}", model)
    end
    requests[i] = wrk.format(nil, (args[5]:gsub("{model}", model)))
  end
end
function request()
  n = (n + stride) % (#requests + 1)
  return requests[n]
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('RESULT {"requests":%d,"seconds":%f,"p50_ms":%f,"p99_ms":%f,"errors":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
