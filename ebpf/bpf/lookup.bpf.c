// SPDX-License-Identifier: Apache-2.0
/*
 * Steering inside one pod's network namespace: which of ztunnel's listeners a new connection belongs to.
 * Consulted only for packets that match no established connection.
 *
 * The context does not say in which namespace it runs, and the tuples of two pods of one node may be the
 * same (A's looped connection to B in A, ztunnel's with A's address in B): therefore one loaded instance
 * per pod, whose index is a constant.
 */
#include "mesh.bpf.h"

/* Set by the loader. */
volatile const __u32 POD_INDEX;

INLINE int hand_to(struct bpf_sk_lookup *ctx, __u32 which)
{
	__u32 slot = POD_INDEX * SLOTS_PER_POD + which;
	struct bpf_sock *listener;
	long failed;

	listener = bpf_map_lookup_elem(&adit_slots, &slot);
	if (!listener)
		return SK_DROP;
	failed = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	return failed ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int adit_lookup(struct bpf_sk_lookup *ctx)
{
	struct flow flow = {};
	__u32 index = POD_INDEX;
	int from_pod, to_pod;
	struct pod *pod;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		flow.source = mapped(FIELD(ctx, remote_ip4));
		flow.destination = mapped(FIELD(ctx, local_ip4));
	} else {
		flow.source.word[0] = FIELD(ctx, remote_ip6[0]);
		flow.source.word[1] = FIELD(ctx, remote_ip6[1]);
		flow.source.word[2] = FIELD(ctx, remote_ip6[2]);
		flow.source.word[3] = FIELD(ctx, remote_ip6[3]);
		flow.destination.word[0] = FIELD(ctx, local_ip6[0]);
		flow.destination.word[1] = FIELD(ctx, local_ip6[1]);
		flow.destination.word[2] = FIELD(ctx, local_ip6[2]);
		flow.destination.word[3] = FIELD(ctx, local_ip6[3]);
	}
	flow.source_port = NET16(ctx->remote_port);
	flow.destination_port = FIELD(ctx, local_port);

	if (is_loopback(&flow.destination))
		return SK_PASS;
	pod = bpf_map_lookup_elem(&adit_pods, &index);
	if (!pod)
		return SK_DROP;
	from_pod = is_own(pod, &flow.source) || is_loopback(&flow.source);
	to_pod = is_own(pod, &flow.destination);

	/* Only a marked socket's connection to elsewhere can arrive here. Not decided by the interface: a
	 * socket bound to eth0 loops by that interface's own route and reports it. */
	if (from_pod && !to_pod)
		return hand_to(ctx, SLOT_OUTBOUND);
	/* ztunnel towards the app: bound to lo, the only way to be reported there (a connection to an own
	 * address reports the interface that has the address, although it too travels over lo). */
	if (ctx->ingress_ifindex == LO_IFINDEX)
		return SK_PASS;
	/* ztunnel to its own pod's HBONE port, when a service resolves to the caller itself. */
	if (flow.destination_port == HBONE_PORT)
		return hand_to(ctx, SLOT_HBONE);
	if (from_pod)
		return SK_PASS;
	if (bpf_map_lookup_elem(&adit_probes, &flow))
		return SK_PASS;
	if (pod->flags & POD_OUTBOUND_ONLY)
		return SK_PASS;
	return hand_to(ctx, SLOT_PLAINTEXT);
}

char _license[] SEC("license") = "Dual MIT/GPL";
