# Sourced by the scripts here.
# shellcheck shell=bash
set -euo pipefail
KIND=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=adit-e2e
# As in integration/cluster: the tests find the kubeconfig here.
DIR=${ADIT_CLUSTER_DIR:-/var/lib/adit/cluster}/kind
command -v kind >/dev/null || {
  echo "error: kind is not installed (kind.sigs.k8s.io), and it needs Docker" >&2
  exit 1
}
