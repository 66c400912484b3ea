// SPDX-License-Identifier: Apache-2.0
/*
 * Outbound capture: connect() of an enrolled pod's process marks the socket, and the mark's rule makes the
 * connection loop over lo to ztunnel with its destination intact (lookup.bpf.c takes it from there).
 *
 * The liveness of ztunnel is decided here and not where the SYN arrives: the kernel sends no RST from an
 * address that is not its own, so a refused SYN of a looped IPv4 connection would leave the app waiting.
 *
 * And bind(): what ztunnel holds open in the pod must not take ports from the app.
 */
#include "mesh.bpf.h"

#define ALLOW 1
#define DENY 0

/*
 * pod index -> what a later process of the node must know to take the pod over or to withdraw it. Used by
 * the loader only.
 */
struct enrolment {
	__u64 cookie;
	__u64 netns_inode;
	__u32 generation;
	__u8 outbound_only;
	__u8 uid_length;
	__u8 address_count;
	__u8 sysctls_before[4];
	__u8 reserved[5];
	__u8 uid[64];
	struct address addresses[MAX_ADDRESSES];
};

struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct enrolment);
	MAP_INT(max_entries, MAX_PODS);
	MAP_INT(pinning, PIN_BY_NAME);
} adit_enrolments SEC(".maps");

INLINE int refuse(void)
{
	bpf_set_retval(-ECONNREFUSED);
	return DENY;
}

/* The destination is not the mesh's business. A mark of an earlier connect() must not steer it all the same. */
INLINE int leave(struct bpf_sock_addr *ctx, __u32 mark)
{
	__u32 none = 0;

	if (mark == MARK_OUT)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &none, sizeof(none));
	return ALLOW;
}

INLINE int steer(struct bpf_sock_addr *ctx, const struct address *destination)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	__u32 mark = MARK_OUT;
	__u32 family, slot, current;
	struct bpf_sock *sk, *listener;
	struct pod *pod;
	__u32 *index;

	index = bpf_map_lookup_elem(&adit_cookies, &cookie);
	if (!index)
		return ALLOW;
	if (ctx->protocol != IPPROTO_TCP)
		return ALLOW;
	sk = ctx->sk;
	if (!sk)
		return refuse();
	current = sk->mark;
	if (current == MARK_OWN || current == MARK_UP)
		return ALLOW;

	/* The array and the slots have room for every index that the loader hands out. */
	__u32 number = *index;

	pod = bpf_map_lookup_elem(&adit_pods, &number);
	if (!pod)
		return refuse();
	if (is_unspecified(destination) || is_loopback(destination) || is_link_local6(destination) ||
	    is_own(pod, destination))
		return leave(ctx, current);
	/* Without an address of the family there is no route: the app learns it as it would without a mesh. */
	family = is_ipv4(destination) ? POD_IPV4 : POD_IPV6;
	if (!(pod->flags & family))
		return leave(ctx, current);

	slot = number * SLOTS_PER_POD + SLOT_OUTBOUND;
	listener = bpf_map_lookup_elem(&adit_slots, &slot);
	if (!listener)
		return refuse();
	bpf_sk_release(listener);
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return refuse();
	return ALLOW;
}

SEC("cgroup/connect4")
int adit_connect4(struct bpf_sock_addr *ctx)
{
	struct address destination = mapped(FIELD(ctx, user_ip4));

	return steer(ctx, &destination);
}

SEC("cgroup/connect6")
int adit_connect6(struct bpf_sock_addr *ctx)
{
	struct address destination = {
		{ FIELD(ctx, user_ip6[0]), FIELD(ctx, user_ip6[1]), FIELD(ctx, user_ip6[2]), FIELD(ctx, user_ip6[3]) },
	};

	return steer(ctx, &destination);
}

/*
 * An accepted connection is filed under the port of its destination, and ztunnel's connection to the app
 * under its source port. To an app that binds such a port it looks taken, for whichever address, unless both
 * sockets have SO_REUSEADDR and none of them listens. ztunnel's have it; most servers set it, and here the
 * others get it. Two listeners of one port still exclude each other.
 *
 * Not when the kernel is to choose the port: it would choose one that another such socket has.
 */
INLINE int share_port(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	int on = 1;

	if (!bpf_map_lookup_elem(&adit_cookies, &cookie))
		return ALLOW;
	if (ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP || !FIELD(ctx, user_port))
		return ALLOW;
	/* Refused, the app meets the port as it is. */
	bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	return ALLOW;
}

SEC("cgroup/bind4")
int adit_bind4(struct bpf_sock_addr *ctx)
{
	return share_port(ctx);
}

SEC("cgroup/bind6")
int adit_bind6(struct bpf_sock_addr *ctx)
{
	return share_port(ctx);
}

char _license[] SEC("license") = "Dual MIT/GPL";
