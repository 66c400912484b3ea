/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the programs of one node share with each other and with the loader. Every structure and constant
 * has its twin in src/abi.rs; a change of layout is a new version there (`LAYOUT`), because the maps
 * outlive the process that made them.
 */
#ifndef ADIT_MESH_BPF_H
#define ADIT_MESH_BPF_H

#include "helpers.bpf.h"

/* Rare values over the full 32 bits: a CNI that tests a few bits of a mark must not meet ours. */
#define MARK_OUT 0x2ad17c01 /* an app's socket that is captured */
#define MARK_UP 0x2ad17c02  /* ztunnel towards the app, with the client's address */
#define MARK_OWN 0x2ad17c03 /* every other socket of ztunnel; no rule matches it */

#define MAX_PODS 1024
#define MAX_ADDRESSES 16
#define MAX_PROBES 16384

#define SLOTS_PER_POD 4
#define SLOT_OUTBOUND 0
#define SLOT_PLAINTEXT 1
#define SLOT_HBONE 2

#define HBONE_PORT 15008

#define POD_OUTBOUND_ONLY 1 /* plaintext that arrives goes to the app, as without a mesh */
#define POD_IPV4 2	    /* rules and routes of this family are in place */
#define POD_IPV6 4

#define LO_IFINDEX 1 /* the same in every network namespace */

/* An IPv6 address in network order; an IPv4 one in its v4-mapped form. */
struct address {
	__u32 word[4];
};

struct pod {
	__u32 flags;
	__u32 address_count;
	struct address addresses[MAX_ADDRESSES];
};

/* One direction of a TCP connection; ports in host order. */
struct flow {
	struct address source;
	struct address destination;
	__u16 source_port;
	__u16 destination_port;
};

/* netns cookie -> pod index. An entry here is what captures: it is written last and removed first. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, __u32);
	MAP_INT(max_entries, MAX_PODS);
	MAP_INT(pinning, PIN_BY_NAME);
} adit_cookies SEC(".maps");

/* pod index -> pod */
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct pod);
	MAP_INT(max_entries, MAX_PODS);
	MAP_INT(pinning, PIN_BY_NAME);
} adit_pods SEC(".maps");

/*
 * pod index * SLOTS_PER_POD + slot -> ztunnel's listening socket. A SOCKMAP holds no reference: a slot
 * empties when its socket is closed, however its process ended. Values of 8 bytes so that user space can
 * look whether one is there.
 */
struct {
	MAP_INT(type, BPF_MAP_TYPE_SOCKMAP);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, __u64);
	MAP_INT(max_entries, MAX_PODS *SLOTS_PER_POD);
	MAP_INT(pinning, PIN_BY_NAME);
} adit_slots SEC(".maps");

/* address of an enrolled pod -> pod index: what the kubelet's connections are compared with. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_TYPE(key, struct address);
	MAP_TYPE(value, __u32);
	MAP_INT(max_entries, MAX_PODS *MAX_ADDRESSES);
	MAP_INT(pinning, PIN_BY_NAME);
} adit_addresses SEC(".maps");

/* The kubelet's live connections to enrolled pods. Never an LRU: an entry must last as long as its flow. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_TYPE(key, struct flow);
	MAP_TYPE(value, __u8);
	MAP_INT(max_entries, MAX_PROBES);
	MAP_INT(pinning, PIN_BY_NAME);
} adit_probes SEC(".maps");

INLINE struct address mapped(__u32 ip4)
{
	struct address a = { { 0, 0, NET32(0xffff), ip4 } };

	return a;
}

INLINE int is_ipv4(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == NET32(0xffff);
}

INLINE int is_loopback(const struct address *a)
{
	if (is_ipv4(a))
		return (a->word[3] & NET32(0xff000000)) == NET32(0x7f000000);
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == 0 && a->word[3] == NET32(1);
}

/* 0.0.0.0 and ::, which connect() takes for loopback. */
INLINE int is_unspecified(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[3] == 0 &&
	       (a->word[2] == 0 || a->word[2] == NET32(0xffff));
}

INLINE int is_link_local6(const struct address *a)
{
	return (a->word[0] & NET32(0xffc00000)) == NET32(0xfe800000);
}

/*
 * A function of its own, for the compiler merges two of them beyond what the stack holds. Without a branch,
 * for the verifier would follow each of the sixteen both ways and take tens of milliseconds for each pod.
 * Entries beyond the count are zero, which is nobody's address.
 */
static __attribute__((noinline)) int is_own(const struct pod *pod, const struct address *a)
{
	const __u32 *own = pod->addresses[0].word;
	__u64 found = 0;

#pragma unroll
	for (int i = 0; i < MAX_ADDRESSES * 4; i += 4) {
		__u64 different = (own[i] ^ a->word[0]) | (own[i + 1] ^ a->word[1]) |
				  (own[i + 2] ^ a->word[2]) | (own[i + 3] ^ a->word[3]);

		/* 32 bits wide: only 0 - 1 reaches the top bit. */
		found |= different - 1;
	}
	return found >> 63;
}

#endif
