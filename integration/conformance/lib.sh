# Sourced by the scripts here.
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
CONFORMANCE=$REPO/integration/conformance
. "$CONFORMANCE/versions"
SUITE=$DIR/conformance
GATEWAY_API_VERSION=$(awk '$1 == "sigs.k8s.io/gateway-api" { print $2; exit }' "$CONFORMANCE/suite/go.mod")
# Any cluster, else the one of integration/cluster.
export KUBECONFIG=${KUBECONFIG:-$KUBECONFIG_FILE}
