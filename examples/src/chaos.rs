//! The story of the quickstart for a process that may die at any moment: every step can be repeated.
//!
//! Each change carries a token of this run, so a new life of the program gets the answers of the old one. Evidence is asked for
//! anew in each life: whoever was killed, a page with the first nonce must be fetched again.

use std::path::Path;
use std::time::Duration;

use iaas_core::ByteSize;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Session;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use uuid::Uuid;

use crate::guest::Guest;
use crate::guest::value;
use crate::machine;
use crate::machine::Arguments;
use crate::machine::Machine;

/// Makes two guests, sees a page fetched, and removes everything.
///
/// # Errors
/// Whatever is not as it should be.
pub async fn run(machine: Machine, arguments: &Arguments) -> Result<()> {
    let (page, removing) = (arguments.state.join("chaos-run"), arguments.state.join("chaos-removing"));
    let run = run_id(&page)?;
    let me = machine.cloud.session_as("operator");
    // A life that came so far has seen everything. The next one would wait for guests that are gone, whose tokens still have
    // their answers.
    if !removing.exists() {
        if let Some(project) = tenant(&me, &run).await? {
            live(&me, project, &run, arguments).await?;
        }
        std::fs::write(&removing, "").map_err(machine::io)?;
    }
    machine::remove_all(&me).await?;
    machine::ensure(machine.cloud.orphans_removed() == 0, || "a sweep removed something".to_owned())?;
    machine.close().await?;
    // In this order: without the run's name the mark would be that of the next run.
    std::fs::remove_file(&removing).and_then(|()| std::fs::remove_file(&page)).map_err(machine::io)?;
    println!("OK");
    Ok(())
}

/// The mark of this run in its tokens; the same in each life.
fn run_id(page: &Path) -> Result<String> {
    if let Ok(text) = std::fs::read_to_string(page)
        && !text.is_empty()
    {
        return Ok(text);
    }
    let run = Uuid::now_v7().to_string();
    let draft = page.with_extension("new");
    std::fs::write(&draft, &run).and_then(|()| std::fs::rename(&draft, page)).map_err(machine::io)?;
    Ok(run)
}

/// The project of this run; `None` if an earlier life has removed it.
async fn tenant(me: &Session, run: &str) -> Result<Option<Id<Project>>> {
    let token = |what: &str| format!("{run}/{what}");
    let organization =
        me.organizations().create(Owner::Cloud, "acme", Empty {}).token(token("organization")).await?.out;
    let project =
        me.projects().create(organization, "shop", ProjectSpec { organization }).token(token("project"));
    match project.await {
        Ok(op) if me.projects().get(op.out).await.is_ok() => Ok(Some(op.out)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn live(me: &Session, project: Id<Project>, run: &str, arguments: &Arguments) -> Result<()> {
    let token = |what: &str| format!("{run}/{what}");
    let network =
        me.networks().create(project, "vpc", NetworkSpec::default()).token(token("network")).await?.out;
    let spec = SubnetSpec::new(network, vec!["10.1.1.0/24".parse()?, "fd00:1:1::/64".parse()?])?;
    let subnet = me.subnets().create(project, "front", spec).token(token("subnet")).await?.out;
    let mut ports = Vec::new();
    for name in ["web", "client"] {
        let spec = PortSpec { subnet, groups: [].into(), addresses: Vec::new() };
        ports.push(me.ports().create(project, name, spec).token(token(name)).await?.out);
    }
    let size = VolumeSpec::new(ByteSize::mib(64))?;
    let volume = me.volumes().create(project, "pages", size).token(token("volume")).await?;
    volume.wait().await?;
    let image = match me.images().named(project, "linux").await {
        Ok(image) => image.meta.id,
        Err(_) => {
            let initrd = Some(arguments.initrd.as_path());
            me.images()
                .import(project, "linux", &arguments.kernel, initrd, "console=ttyS0 panic=-1 quiet")
                .await?
                .out
        }
    };
    let spec = InstanceTypeSpec::new(1, ByteSize::mib(192))?;
    let size = me.instance_types().create(Owner::Cloud, "small", spec).token(token("size")).await?.out;
    let peers: Vec<_> = me.ports().get(ports[0]).await?.bind.addrs;
    let peers: Vec<_> =
        peers.iter().map(|a| format!("guest.peer{}={a}", if a.is_ipv4() { 4 } else { 6 })).collect();
    let mut guests = Vec::new();
    for (name, cmdline, volumes) in [
        ("web", "guest.run=web".to_owned(), vec![volume.out]),
        ("client", format!("guest.run=client {}", peers.join(" ")), vec![]),
    ] {
        let nics = vec![Nic::Port(ports[guests.len()])];
        let new = NewInstance { name: name.to_owned(), instance_type: size, image, cmdline, nics, volumes };
        guests.push(me.instances().launch(project, new).token(token(&format!("{name}-instance"))).await?.out);
    }
    let (mut web, mut client) = (Guest::follow(me, guests[0]), Guest::follow(me, guests[1]));
    let nonce = web.line("WEB-NONCE", LONG).await?;
    let nonce = nonce.split_ascii_whitespace().nth(1).unwrap_or_default().to_owned();
    println!("serving {nonce}");
    let mut from = client.lines().len();
    for _ in 0..PAGES {
        let (at, page) = client.line_after(from, "FETCH nonce", LONG).await?;
        machine::ensure(value(&page, "nonce") == Some(&nonce), || format!("another page: {page}"))?;
        from = at + 1;
    }
    println!("{PAGES} pages with the same nonce");
    Ok(())
}

/// How long a guest may take, also when it was killed while it booted.
const LONG: Duration = Duration::from_secs(120);
/// Pages to see in each life.
const PAGES: usize = 50;
