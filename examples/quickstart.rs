//! A cloud in one binary, told as a story: tenants, a network, a volume, two real guests, the death of the control plane
//! under them, a bill, and nothing left behind. `cargo xtask quickstart` runs it.
//!
//! Every line that it prints says how we know, from the guests' consoles and not from our own state.

use std::path::Path;
use std::process::ExitCode;

use iaas_core::ByteSize;
use iaas_core::Id;
use iaas_core::PortRange;
use iaas_core::Result;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Session;
use iaas_core::model::security_group::Direction;
use iaas_core::model::security_group::Protocol;
use iaas_core::model::security_group::Remote;
use iaas_core::model::security_group::Rule;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_examples::gaps;
use iaas_examples::guest::Guest;
use iaas_examples::guest::value;
use iaas_examples::machine;
use iaas_examples::machine::Arguments;
use iaas_examples::machine::Machine;
use iaas_examples::memory::Memory;
use iaas_examples::report::Report;
use iaas_examples::supervise;
use iaas_examples::supervise::Process;
use iaas_examples::trials;
use iaas_examples::trials::BOOT;
use iaas_examples::trials::PERIOD;

fn main() -> ExitCode {
    // The same binary is also the runner of each VM and the switch of the host: this line never returns in those.
    machine::init();
    let arguments = Arguments::parse();
    let done = if arguments.control || arguments.chaos {
        control(&arguments)
    } else {
        supervise::until_done(1).map_err(machine::io)
    };
    done.unwrap_or_else(|error| {
        eprintln!("quickstart failed ({:?}): {error:#}", error.kind());
        ExitCode::FAILURE
    })
}

/// The control plane: the caller's runtime, and a cloud in it.
#[tokio::main]
async fn control(arguments: &Arguments) -> Result<ExitCode> {
    let machine = machine::open(&arguments.state).await?;
    if arguments.chaos {
        return iaas_examples::chaos::run(machine, arguments).await.map(|()| ExitCode::SUCCESS);
    }
    let session = machine.cloud.session_as("operator");
    let page = arguments.state.join("quickstart.json");
    let told = story(&machine, &session, &page, arguments).await;
    if told.is_err() || !arguments.keep {
        // Also after a failure: what went wrong must not stand in the way of the next attempt.
        machine::remove_all(&session).await?;
        let _ = std::fs::remove_file(&page);
        machine.close().await?;
    }
    told.map(|()| ExitCode::SUCCESS)
}

async fn story(machine: &Machine, me: &Session, page: &Path, arguments: &Arguments) -> Result<()> {
    let mut report = Report::new(arguments.json);
    let Some(mut memory) = Memory::read(page)? else {
        report.step("machine", &machine.why);
        // Without it every instance would wait for somebody to install it.
        machine.can_boot()?;
        build(me, arguments, &mut report).await?.write(page)?;
        report.step("kill -9", "the control process kills itself; the guests go on");
        supervise::kill_self()
    };
    trials::adopt(&machine.cloud, me, &memory, &mut report).await?;
    trials::restart_switch(me, &memory, arguments, &mut report).await?;
    if arguments.keep {
        report.step("keep", "both guests go on running; the next start adopts them");
        memory.killed_at = None;
        memory.control = Process::me().map_err(machine::io)?;
        return memory.write(page);
    }
    let web = replace_web(me, &memory, &mut report).await?;
    trials::bill(me, &memory, web, arguments, &mut report).await?;
    clean_up(me, machine, &memory, web, &mut report).await
}

async fn build(me: &Session, arguments: &Arguments, report: &mut Report) -> Result<Memory> {
    // A tenant, and what things cost.
    let organization = me.organizations().create(Owner::Cloud, "acme", Empty {}).await?.out;
    let project = me.projects().create(organization, "shop", ProjectSpec { organization }).await?.out;
    let book = me.price_books().create(Owner::Cloud, "list-prices", machine::prices()?).await?.out;
    report.step("tenant", format!("organization {organization}, project {project}"));

    // A VPC of two dual-stack subnets; a firewall that lets members ping each other and fetch pages.
    let network = me.networks().create(project, "vpc", NetworkSpec::default()).await?.out;
    let mut subnets = Vec::new();
    for (name, v4, v6) in
        [("front", "10.1.1.0/24", "fd00:1:1::/64"), ("back", "10.1.2.0/24", "fd00:1:2::/64")]
    {
        let spec = SubnetSpec::new(network, vec![v4.parse()?, v6.parse()?])?;
        subnets.push(me.subnets().create(project, name, spec).await?.out);
    }
    let group = me.security_groups().create(project, "members", SecurityGroupSpec::default()).await?.out;
    let allow = |direction, protocol, ports, remote| Rule { direction, protocol, ports, remote };
    let rules = vec![
        allow(Direction::Ingress, Protocol::Icmp, PortRange::ALL, Remote::Group(group)),
        allow(Direction::Ingress, Protocol::Tcp, PortRange::one(8080), Remote::Group(group)),
        allow(Direction::Egress, Protocol::Any, PortRange::ALL, Remote::Any),
    ];
    me.security_groups().replace(group, SecurityGroupSpec::new(rules)?).await?;
    let mut ports = Vec::new();
    for (name, subnet) in [("web", subnets[0]), ("client", subnets[1])] {
        let spec = PortSpec { subnet, groups: [group].into(), addresses: Vec::new() };
        ports.push(me.ports().create(project, name, spec).await?.out);
    }
    let addresses = me.ports().get(ports[0]).await?.bind.addrs;
    report.step("network", format!("two subnets, one security group; web will be {addresses:?}"));

    // A volume, an image, two instances.
    let volume =
        me.volumes().create(project, "pages", VolumeSpec::new(ByteSize::gib(1))?).await?.wait().await?;
    let (kernel, initrd) = (&arguments.kernel, Some(arguments.initrd.as_path()));
    let image =
        me.images().import(project, "linux", kernel, initrd, "console=ttyS0 panic=-1 quiet").await?.out;
    let size = InstanceTypeSpec::new(1, ByteSize::mib(192))?;
    let size = me.instance_types().create(Owner::Cloud, "small", size).await?.out;
    let instance = |name: &str, cmdline: String, port, volumes| NewInstance {
        name: name.to_owned(),
        instance_type: size,
        image,
        cmdline,
        nics: vec![Nic::Port(port)],
        volumes,
    };
    let peers: Vec<_> =
        addresses.iter().map(|a| format!("guest.peer{}={a}", if a.is_ipv4() { 4 } else { 6 })).collect();
    let web = instance("web", "guest.run=web".to_owned(), ports[0], vec![volume]);
    let client = instance("client", format!("guest.run=client {}", peers.join(" ")), ports[1], Vec::new());
    report.waiting("web and client are being made");
    let (web, client) =
        (me.instances().launch(project, web).await?, me.instances().launch(project, client).await?);
    let (web, client) = (web.wait().await?, client.wait().await?);

    // From here on only the guests testify.
    let mut at_web = Guest::follow(me, web);
    report.waiting("web boots a Debian kernel");
    let web_boot = at_web.line("GUEST-READY", BOOT).await?;
    report.step("web", &web_boot);
    let nonce = at_web.line("WEB-NONCE", BOOT).await?;
    report.step("volume", format!("web made ext4, mounted it and wrote a page: {nonce}"));
    let nonce = value(&nonce.replace(' ', "="), "WEB-NONCE").unwrap_or_default().to_owned();
    let mut at_client = Guest::follow(me, client);
    report.waiting("client boots");
    let client_boot = at_client.line("GUEST-READY", BOOT).await?;
    for family in ["PING4", "PING6"] {
        let line = at_client.line(family, BOOT).await?;
        machine::ensure(line.contains(" ok "), || format!("client could not ping web: {line}"))?;
        report.step("ping", line);
    }
    let page = at_client.line("FETCH nonce", BOOT).await?;
    machine::ensure(value(&page, "nonce") == Some(&nonce), || format!("another page: {page}"))?;
    report.step("http", page);
    let closed = at_client.line("CLOSED", BOOT).await?;
    machine::ensure(closed.starts_with("CLOSED dropped"), || format!("port 81 answered: {closed}"))?;
    report.step("firewall", closed);
    trials::explain_drop(me, ports[1], addresses[0], report).await?;

    // The quiet period that later gaps are measured against.
    at_client.line("TICK", BOOT).await?;
    let from = gaps::uptime(&at_client).unwrap_or(0.0);
    report.waiting("five quiet seconds");
    gaps::reach(&mut at_client, from + PERIOD).await?;
    let quiet = gaps::between(&at_client, from, from + PERIOD)?;
    report.step("quiet", trials::shown(quiet));
    let boot_id = |line: &str| value(line, "boot_id").unwrap_or_default().to_owned();
    let boot_ids = [boot_id(&web_boot), boot_id(&client_boot)];
    let killed_at = gaps::uptime(&at_client);
    let (web_port, client_port) = (ports[0], ports[1]);
    Ok(Memory {
        organization,
        project,
        web,
        client,
        volume,
        web_port,
        client_port,
        image,
        size,
        book,
        nonce,
        boot_ids,
        control: Process::me().map_err(machine::io)?,
        quiet,
        killed_at,
    })
}

/// Another instance on the same volume and port: the page outlives the machine that wrote it.
async fn replace_web(me: &Session, memory: &Memory, report: &mut Report) -> Result<Id<Instance>> {
    report.waiting("web is destroyed and made anew on the same volume");
    me.instances().delete(memory.web).await?.wait().await?;
    let web = NewInstance {
        name: "web".to_owned(),
        instance_type: memory.size,
        image: memory.image,
        cmdline: "guest.run=web".to_owned(),
        nics: vec![Nic::Port(memory.web_port)],
        volumes: vec![memory.volume],
    };
    let web = me.instances().launch(memory.project, web).await?.wait().await?;
    let mut guest = Guest::follow(me, web);
    let nonce = guest.line("WEB-NONCE", BOOT).await?;
    machine::ensure(nonce.ends_with(&memory.nonce), || {
        format!("the page changed: {nonce}, was {}", memory.nonce)
    })?;
    let mut client = Guest::follow(me, memory.client);
    let from = client.now().await?;
    let page = client.line_after(from, "FETCH nonce", BOOT).await?.1;
    machine::ensure(value(&page, "nonce") == Some(&memory.nonce), || format!("another page: {page}"))?;
    report.step("same volume", format!("the new web serves the old page: {page}"));
    Ok(web)
}

async fn clean_up(
    me: &Session,
    machine: &Machine,
    memory: &Memory,
    web: Id<Instance>,
    report: &mut Report,
) -> Result<()> {
    report.waiting("everything is deleted");
    let (a, b) = (me.instances().delete(web).await?, me.instances().delete(memory.client).await?);
    a.wait().await?;
    b.wait().await?;
    report.step("e2fsck", machine.check_volume(memory.volume)?);
    machine::remove_all(me).await?;
    machine::ensure(machine.cloud.orphans_removed() == 0, || "a sweep removed something".to_owned())?;
    report.step("deleted", "instances, volume, ports, subnets, network, group, image, project, organization");
    Ok(())
}
