//! nginx and HAProxy with the routes, the deny rules and the access log that the waypoint has.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use super::ground::{Ground, HostId, PROXY_CORE, Process};
use super::setup::{PLAIN_PORT, Setup};

/// nginx's access log.
pub(super) const NGINX_LOG: &str = "nginx/access.log";

/// Finds a program where Debian has it, also where a user's PATH has no `sbin`.
pub(super) fn find(program: &str) -> anyhow::Result<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain([Path::new("/usr/sbin").into()]);
    let mut candidates = directories.map(|directory| directory.join(program));
    match candidates.find(|candidate| candidate.is_file()) {
        Some(found) => Ok(found),
        None => bail!("{program} is not installed (integration/scripts/install-deps bench)"),
    }
}

pub(super) fn nginx(ground: &Ground, setup: Setup) -> anyhow::Result<Process> {
    let listen = ground.address(HostId::Nginx, PLAIN_PORT);
    let upstream = ground.address(HostId::Plain, setup.upstream_port());
    let directory = ground.path("nginx");
    std::fs::create_dir_all(&directory)?;
    let config = nginx_config(
        setup,
        &listen.to_string(),
        &upstream.to_string(),
        &directory,
    );
    let config = ground.write("nginx/nginx.conf", &config)?;
    let mut command = Command::new(find("nginx")?);
    command.arg("-p").arg(&directory).arg("-c").arg(config);
    // Whatever goes wrong before the configuration is read is said on standard error.
    command.arg("-e").arg("/dev/stderr");
    let process = ground.start("nginx", PROXY_CORE, command)?;
    process.wait_listening(&[listen]).context("nginx")?;
    Ok(process)
}

fn nginx_config(setup: Setup, listen: &str, upstream: &str, directory: &Path) -> String {
    let log = directory.join("access.log");
    let (http2, pass) = match setup.http2 {
        true => (" http2", "grpc_pass grpc"),
        false => ("", "proxy_pass http"),
    };
    let mut out = format!(
        "daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid;\n\
         error_log stderr warn;\n\
         events {{ worker_connections 8192; }}\n\
         http {{\n\
         access_log {log} combined buffer=64k;\n\
         keepalive_requests 1000000000; map_hash_max_size 65536; map_hash_bucket_size 128;\n\
         variables_hash_max_size 4096; proxy_http_version 1.1;\n\
         client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;\n\
         upstream web {{ server {upstream}; keepalive 1024; keepalive_requests 1000000000; }}\n\
         map $uri $denied {{ default 0;\n",
        directory = directory.display(),
        log = log.display(),
    );
    // A String takes everything, here and below.
    for path in setup.denied_paths() {
        let _ = writeln!(out, "{path} 1;");
    }
    let _ = write!(
        out,
        "}}\nserver {{ listen {listen}{http2} reuseport;\n\
         if ($request_method = DELETE) {{ return 403; }}\n\
         if ($denied) {{ return 403; }}\n\
         location ^~ /admin {{ return 403; }}\n\
         location / {{ return 404; }}\n"
    );
    let header = if setup.http2 { "grpc" } else { "proxy" };
    for route in 0..setup.routes {
        let _ = writeln!(
            out,
            "location /r{route}/ {{ {pass}://web; {header}_set_header Connection \"\"; \
             {header}_set_header Host $host; {header}_set_header x-route r{route}; }}"
        );
    }
    out + "}\n}\n"
}

pub(super) fn haproxy(ground: &Ground, setup: Setup) -> anyhow::Result<Process> {
    let listen = ground.address(HostId::Haproxy, PLAIN_PORT);
    let upstream = ground.address(HostId::Plain, setup.upstream_port());
    let mut routes = String::new();
    for route in 0..setup.routes {
        let _ = writeln!(routes, "/r{route}/ r{route}");
    }
    let routes = ground.write("haproxy/routes.map", &routes)?;
    let mut denied = String::new();
    for path in setup.denied_paths() {
        let _ = writeln!(denied, "{path}");
    }
    let denied = ground.write("haproxy/denied.lst", &denied)?;
    let protocol = if setup.http2 { " proto h2" } else { "" };
    let config = format!(
        "global\n nbthread 1\n maxconn 8192\n log stdout format raw local0\n\
         defaults\n mode http\n log global\n option httplog\n http-reuse always\n\
         \x20timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
         frontend main\n bind {listen}{protocol}\n\
         \x20http-request deny if {{ path_beg /admin }} or {{ method DELETE }}\n\
         \x20http-request deny if {{ path -f {denied} }}\n\
         \x20http-request set-var(txn.route) path,map_beg({routes})\n\
         \x20http-request return status 404 if !{{ var(txn.route) -m found }}\n\
         \x20http-request set-header x-route %[var(txn.route)]\n\
         \x20default_backend web\n\
         backend web\n server one {upstream}{protocol}\n",
        routes = routes.display(),
        denied = denied.display(),
    );
    let config = ground.write("haproxy/haproxy.cfg", &config)?;
    let mut command = Command::new(find("haproxy")?);
    // In the foreground, one process.
    command.arg("-db").arg("-f").arg(config);
    let process = ground.start("haproxy", PROXY_CORE, command)?;
    process.wait_listening(&[listen]).context("HAProxy")?;
    Ok(process)
}
