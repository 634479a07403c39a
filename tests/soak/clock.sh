#!/usr/bin/env bash
# The wall clock leaps, a year forwards and then two back, while somebody speaks: the voice, the pictures and the session
# must not notice. `bash tests/soak/clock.sh target/release/loquent`; needs Debian's faketime, curl, espeak-ng and the
# example `talk` (cargo build --release --example talk).
set -euo pipefail
program=$(realpath "${1:?the program}")
talk=$(dirname "$program")/../release/examples/talk
folder=$(mktemp -d)
trap 'kill $service 2>/dev/null || true; rm -rf "$folder"' EXIT
library=$(find /usr/lib -name libfaketimeMT.so.1 | head -1)
[ -n "$library" ] || { echo "install faketime (apt-get install faketime)"; exit 2; }
echo "+0" > "$folder/time"
LD_PRELOAD=$library FAKETIME_TIMESTAMP_FILE=$folder/time FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_NO_CACHE=1 FAKETIME_DONT_RESET=1 \
    "$program" serve --engine card --listen 127.0.0.1:0 --stop-after 60 > "$folder/out" 2> "$folder/log" &
service=$!
for _ in $(seq 100); do grep -q 'Open http' "$folder/out" && break; sleep 0.1; done
url=$(grep -o 'http://[0-9.:]*' "$folder/out" | head -1)
espeak-ng -w "$folder/speech.wav" "The clock of this machine is going to leap, and nobody in the conversation is to notice anything of it at all."
before=$(curl -sI "$url/" | grep -i '^date:' || true)
"$talk" --url "$url" --speech "$folder/speech.wav" --seconds 15 > "$folder/talk" 2>&1 &
talking=$!
sleep 5; echo "+365d" > "$folder/time"
sleep 3; after=$(curl -sI "$url/" | grep -i '^date:' || true)
sleep 1; echo "-365d" > "$folder/time"
wait $talking || { cat "$folder/talk"; exit 1; }
cat "$folder/talk"
echo "the service's clock: $before then $after"
[ "$before" != "$after" ] && [ "${before##*, }" != "" ] || { echo "FAILED: the clock did not leap"; exit 1; }
grep -Eqi 'panick|ERROR' "$folder/log" && { cat "$folder/log"; echo "FAILED"; exit 1; }
metrics=$(curl -s "$url/metrics")
grep -q '^loquent_engine_ready 1' <<< "$metrics" || { echo "FAILED: the engine"; exit 1; }
echo passed
