// SPDX-License-Identifier: Apache-2.0
/*
 * The kubelet's probes reach the app without the mesh: on the kubelet's cgroup, every connection to an
 * enrolled pod is noted before its SYN leaves and forgotten when it closes. lookup.bpf.c lets exactly
 * these through, so that no other process of the host gets past the mesh, and no address is translated.
 */
#include "mesh.bpf.h"

/*
 * The cookie of the kubelet's network namespace, 0 for any. Set by the loader. A kubelet may sit in a cgroup
 * above the pods' (the root): what runs in namespaces of their own is then told apart by this.
 */
volatile const __u64 KUBELET_NETNS;

INLINE void flow_of(struct bpf_sock_ops *ctx, struct flow *flow)
{
	if (ctx->family == AF_INET) {
		flow->source = mapped(FIELD(ctx, local_ip4));
		flow->destination = mapped(FIELD(ctx, remote_ip4));
	} else {
		flow->source.word[0] = FIELD(ctx, local_ip6[0]);
		flow->source.word[1] = FIELD(ctx, local_ip6[1]);
		flow->source.word[2] = FIELD(ctx, local_ip6[2]);
		flow->source.word[3] = FIELD(ctx, local_ip6[3]);
		flow->destination.word[0] = FIELD(ctx, remote_ip6[0]);
		flow->destination.word[1] = FIELD(ctx, remote_ip6[1]);
		flow->destination.word[2] = FIELD(ctx, remote_ip6[2]);
		flow->destination.word[3] = FIELD(ctx, remote_ip6[3]);
	}
	flow->source_port = FIELD(ctx, local_port);
	/* A 32-bit value in network order. */
	flow->destination_port = NET32(FIELD(ctx, remote_port));
}

SEC("sockops")
int adit_probe(struct bpf_sock_ops *ctx)
{
	struct flow flow = {};
	__u8 present = 1;

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (KUBELET_NETNS && bpf_get_netns_cookie(ctx) != KUBELET_NETNS)
			return 1;
		flow_of(ctx, &flow);
		if (!bpf_map_lookup_elem(&adit_addresses, &flow.destination))
			return 1;
		if (bpf_map_update_elem(&adit_probes, &flow, &present, BPF_ANY))
			return 1;
		/* An entry whose end would not be seen must not stay. */
		if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG))
			bpf_map_delete_elem(&adit_probes, &flow);
		return 1;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] != BPF_TCP_CLOSE)
			return 1;
		flow_of(ctx, &flow);
		bpf_map_delete_elem(&adit_probes, &flow);
		return 1;
	}
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
