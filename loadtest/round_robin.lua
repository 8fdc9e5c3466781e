-- wrk: one body, target models m0 ... mN-1 (suffix given) in a fixed stride. Arguments: BODY_FILE COUNT SUFFIX CONTENT_TYPE
local count, suffix, n = 1, "", 0
function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.body, wrk.method = file:read("*a"), "POST"
  file:close()
  count, suffix = tonumber(args[2]), args[3]
  wrk.headers["Content-Type"] = args[4]
end
function request()
  n = (n + 7) % count
  wrk.headers["X-Amzn-SageMaker-Target-Model"] = "m" .. n .. suffix
  return wrk.format()
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('RESULT {"requests":%d,"seconds":%f,"p50_ms":%f,"p99_ms":%f,"errors":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
