//! `adit-kubelet`: started by `adit local`, never by hand.

fn main() -> std::io::Result<()> {
    adit_local::kubelet::main()
}
