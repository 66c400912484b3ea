//! What the process asks of the system for itself.

pub use adit_shared::process::{IdleMemory, notify_ready, raise_descriptor_limit};

/// Blocks up to this size come from the heap and go back to it, instead of being mapped and
/// unmapped each time: the largest frame is 1 MiB.
const MMAP_THRESHOLD: libc::c_int = 4 << 20;
/// So much free memory at the top of each thread's heap is kept. More than what a few connections
/// have under way in DATA frames (their windows are 16 MiB each): it comes and goes with every
/// turn, and at 8 MiB the receiving side of 8 streams took 10,000 to 180,000 page faults a second.
const TRIM_THRESHOLD: libc::c_int = 32 << 20;

/// Keeps glibc from giving the pages of large buffers back to the kernel after each frame,
/// which costs more than anything else on bulk transfers.
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets parameters of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD);
        libc::mallopt(libc::M_ARENA_MAX, 8);
    }
}

/// Gives memory that is free back to the kernel: what only starting needed, what a burst left.
/// Not for hot paths, see [`tune_allocator`].
pub fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim touches nothing but the allocator's own free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}
