//! Compiles `proto/` with a protoc written in Rust, so that a build needs only cargo.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/workload.proto",
        "proto/authorization.proto",
        "proto/xds.proto",
        "proto/ca.proto",
        "proto/enrolment.proto",
        "proto/waypoint.proto",
        "proto/otlp.proto",
        "proto/ext_authz.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    // Maps in order: equal messages must encode to equal bytes, because the version of a
    // resource is a hash of them (src/xds/resources.rs).
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
