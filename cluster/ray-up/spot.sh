#!/usr/bin/env bash
# Ray on a spot machine: when the cloud says that it takes the machine back, Ray drains, so that raysweep's gangs there
# save and their trials go on elsewhere.
#
#   cluster/ray-up/spot.sh aws|gcp ray start --address=HEAD:6379 --block
#
# The machine's metadata service is asked each 2 s. AWS tells two minutes ahead, Google Cloud 30 s. AWS's recommendation
# to rebalance is no notice: a machine may go on for days after it, and saving takes seconds of the two minutes.
set -euo pipefail

cloud=${1:?usage: spot.sh aws|gcp ray start --address=HEAD:6379 --block}
shift
service=${RAYSWEEP_METADATA_URL:-http://169.254.169.254}

ask() { # An error's status, and a service that does not answer, are no answer.
  curl --silent --fail --noproxy '*' --max-time 2 "$@"
}

is_taken_back() {
  local token
  case $cloud in
    aws) # 404 until there is a notice.
      token=$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$service/latest/api/token") &&
        ask -H "X-aws-ec2-metadata-token: $token" "$service/latest/meta-data/spot/instance-action" >/dev/null
      ;;
    gcp) [ "$(ask -H 'Metadata-Flavor: Google' "$service/computeMetadata/v1/instance/preempted")" = TRUE ] ;;
  esac
}

# How long Ray waits for its node to be idle before it ends what is left there: most of what the cloud gives.
case $cloud in
  aws) export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=110 ;;
  gcp) export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=25 ;;
  *) echo "spot.sh: unknown cloud '$cloud'; known: aws, gcp" >&2 && exit 2 ;;
esac

# The autoscaler starts Ray again where it has ended, which would draw gangs to a machine that is about to go.
if is_taken_back; then echo "spot.sh: this machine is about to be taken back: no Ray starts here" >&2 && exit 1; fi

while kill -0 $$ 2>/dev/null; do # For as long as there is a Ray, which takes this process's number.
  if is_taken_back; then
    echo "spot.sh: this machine is about to be taken back: Ray drains" >&2
    kill -TERM $$
    break
  fi
  sleep 2
done &
exec "$@"
