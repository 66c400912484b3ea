/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The few helpers that Adit's programs call, declared over the uapi ids, so that building them needs
 * nothing but clang and the kernel's uapi headers.
 */
#ifndef ADIT_HELPERS_BPF_H
#define ADIT_HELPERS_BPF_H

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))

/* A map's definition is read from its BTF: a type is the size of an array, a value is a type. */
#define MAP_INT(name, value) int(*name)[value]
#define MAP_TYPE(name, type) typeof(type) *name
/* LIBBPF_PIN_BY_NAME: the loader opens the map's pin, or creates the map and pins it. */
#define PIN_BY_NAME 1

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NET16(x) ((__u16)__builtin_bswap16(x))
#define NET32(x) ((__u32)__builtin_bswap32(x))
#else
#define NET16(x) ((__u16)(x))
#define NET32(x) ((__u32)(x))
#endif

/*
 * Reads a 32-bit field of a context at its constant offset. The compiler, left alone, merges the branches of
 * the address families into a read at a computed offset, which the verifier refuses.
 */
#define FIELD(ctx, member)                                                                         \
	({                                                                                         \
		__u64 _value;                                                                      \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                              \
			     : "=r"(_value)                                                        \
			     : "r"(ctx), "i"(__builtin_offsetof(typeof(*(ctx)), member)));         \
		(__u32) _value;                                                                    \
	})

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define SOCK_STREAM 1
#define SOL_SOCKET 1
#define SO_REUSEADDR 2
#define SO_MARK 36
#define ECONNREFUSED 111

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) =
	(void *)BPF_FUNC_map_update_elem;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static __u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static long (*bpf_setsockopt)(void *ctx, int level, int name, void *value, int length) =
	(void *)BPF_FUNC_setsockopt;
static int (*bpf_set_retval)(int retval) = (void *)BPF_FUNC_set_retval;
static long (*bpf_sk_assign)(void *ctx, void *sk, __u64 flags) = (void *)BPF_FUNC_sk_assign;
static long (*bpf_sk_release)(void *sk) = (void *)BPF_FUNC_sk_release;
static long (*bpf_sock_ops_cb_flags_set)(struct bpf_sock_ops *ctx, int flags) =
	(void *)BPF_FUNC_sock_ops_cb_flags_set;

#endif
