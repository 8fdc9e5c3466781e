#!/bin/bash
# OpenStack Swift with its S3 API, one node on loopback: the second, independent S3 server of the tests.
#   apt-get install swift-proxy swift-account swift-container swift-object memcached
# usage: swift.sh DIR PORT    needs PORT .. PORT+4 free; state, logs and pids lie in DIR; runs until kill $(cat DIR/pids).
# Endpoint http://127.0.0.1:PORT, access key test:tester, secret testing, region us-east-1, path-style addressing.
set -eu
dir=$(realpath -m "$1") port=$2
mkdir -p "$dir"/{etc,disk/sdb1,run,log}
cd "$dir"
: >pids

common="bind_ip = 127.0.0.1
bind_timeout = 1
user = $(id -un)
workers = 0
swift_dir = $dir/etc"

cat >etc/swift.conf <<C
[swift-hash]
swift_hash_path_prefix = fleetcast
swift_hash_path_suffix = tests
[storage-policy:0]
name = gold
default = yes
C

p=$((port + 1))
for server in account container object; do
  p=$((p + 1))
  cat >etc/$server.conf <<C
[DEFAULT]
$common
bind_port = $p
devices = $dir/disk
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
recon_cache_path = $dir/run
[pipeline:main]
pipeline = $server-server
[app:$server-server]
use = egg:swift#$server
conn_timeout = 10
node_timeout = 30
C
  ring=etc/$server.builder
  { swift-ring-builder $ring create 4 1 1
    swift-ring-builder $ring add "r1z1-127.0.0.1:$p/sdb1" 1
    swift-ring-builder $ring rebalance; } >log/ring.log
done

filters="catch_errors cache listing_formats bulk s3api tempauth copy slo dlo versioned_writes"
cat >etc/proxy.conf <<C
[DEFAULT]
$common
bind_port = $port
[pipeline:main]
pipeline = $filters proxy-server
[app:proxy-server]
use = egg:swift#proxy
# One node of each kind: on a busy machine a slow answer must not make the proxy avoid its only node for a minute.
conn_timeout = 10
node_timeout = 30
recoverable_node_timeout = 30
error_suppression_interval = 0
error_suppression_limit = 1000000
account_autocreate = true
allow_account_management = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:$((port + 1))
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
C
for filter in catch_errors listing_formats bulk copy slo dlo versioned_writes; do
  printf '[filter:%s]\nuse = egg:swift#%s\n' $filter $filter >>etc/proxy.conf
done

export SWIFT_CONF_DIR="$dir/etc"
run() {
  setsid "$@" >"log/$1.log" 2>&1 </dev/null &
  echo $! >>pids
}
run memcached -u "$(id -un)" -p $((port + 1)) -l 127.0.0.1
for server in account container object; do run swift-$server-server etc/$server.conf; done
run swift-proxy-server etc/proxy.conf

for _ in $(seq 600); do
  curl -s -m 1 -o log/hello "http://127.0.0.1:$port/" && exit 0
  for pid in $(cat pids); do
    grep -q '^State:[[:space:]]*[^ZX]' "/proc/$pid/status" 2>/dev/null || { echo "one of swift's servers has ended; see $dir/log" >&2; exit 1; }
  done
  sleep 0.1
done
echo "swift did not start; see $dir/log" >&2
exit 1
