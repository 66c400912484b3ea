# Sourced by node-init and api-server: the command lines of the control plane.
# shellcheck shell=bash

# etcd_command DATA CLIENT_PORT PEER_PORT: sets `command`. fsync is off: the data
# need not outlive the machine.
etcd_command() {
  local client=http://127.0.0.1:$2 peer=http://127.0.0.1:$3
  command=("$BIN/etcd" --data-dir "$1" --listen-client-urls "$client" --advertise-client-urls "$client"
    --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "default=$peer"
    --unsafe-no-fsync --log-level warn)
}

# apiserver_command PKI ETCD_PORT ADDRESS PORT SERVICES: sets `command`.
apiserver_command() {
  local pki=$1 bind=0.0.0.0
  [[ $3$5 != *:* ]] || bind=::
  command=("$BIN/kube-apiserver" --etcd-servers="http://127.0.0.1:$2"
    --advertise-address="$3" --bind-address="$bind" --secure-port="$4" --service-cluster-ip-range="$5"
    --allow-privileged=true --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction
    # Node names do not resolve: exec and logs would hang.
    --kubelet-preferred-address-types=InternalIP,Hostname
    --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key"
    --kubelet-client-certificate="$pki/apiserver-kubelet-client.crt"
    --kubelet-client-key="$pki/apiserver-kubelet-client.key" --kubelet-certificate-authority="$pki/ca.crt"
    --service-account-issuer=https://kubernetes.default.svc.cluster.local
    --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key"
    --requestheader-client-ca-file="$pki/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group
    --requestheader-username-headers=X-Remote-User
    --proxy-client-cert-file="$pki/front-proxy-client.crt" --proxy-client-key-file="$pki/front-proxy-client.key"
    --profiling=false --v=1)
}

# controller_manager_command PKI PORT: sets `command`.
controller_manager_command() {
  local pki=$1 config=$1/controller-manager.kubeconfig
  command=("$BIN/kube-controller-manager" --kubeconfig="$config" --authentication-kubeconfig="$config"
    --authorization-kubeconfig="$config" --leader-elect=false --use-service-account-credentials=true
    --root-ca-file="$pki/ca.crt" --service-account-private-key-file="$pki/sa.key"
    --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key"
    --client-ca-file="$pki/ca.crt" --bind-address=127.0.0.1 --secure-port="$2" --v=1)
}

# api_ready URL: the API server answers to anonymous callers only when the RBAC
# bootstrap is done, without which the controller manager gives up.
api_ready() { [ "$(curl -sko /dev/null -m 2 -w '%{http_code}' "$1/readyz")" = 200 ]; }
