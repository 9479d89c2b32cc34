//! A cloud in one binary, told as a story: tenants, a network, a volume, two real guests, the death of the control plane
//! under them, a bill, and nothing left behind. `cargo xtask quickstart` runs it.
//!
//! Every line that it prints says how we know, from the guests' consoles and not from our own state.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use iaas_core::ByteSize;
use iaas_core::Cloud;
use iaas_core::Error;
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
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Verdict;
use iaas_examples::gaps;
use iaas_examples::gaps::Seen;
use iaas_examples::guest::Guest;
use iaas_examples::guest::value;
use iaas_examples::machine;
use iaas_examples::machine::Arguments;
use iaas_examples::report::Report;
use iaas_examples::supervise;
use serde::Deserialize;
use serde::Serialize;

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
        eprintln!("quickstart failed: {error:#}");
        ExitCode::FAILURE
    })
}

/// The control plane: the caller's runtime, and a cloud in it.
#[tokio::main]
async fn control(arguments: &Arguments) -> Result<ExitCode> {
    let mut report = Report::new(arguments.json);
    let machine = machine::open(&arguments.state).await?;
    if arguments.chaos {
        return iaas_examples::chaos::run(machine, arguments).await.map(|()| ExitCode::SUCCESS);
    }
    let session = machine.cloud.session_as("operator");
    let page = arguments.state.join("quickstart.json");
    match Memory::read(&page)? {
        None => {
            report.step("machine", &machine.why);
            let memory = build(&session, arguments, &mut report).await?;
            memory.write(&page)?;
            report.step("kill -9", "the control process kills itself; the guests go on");
            supervise::kill_self()
        }
        Some(memory) => {
            adopt(&machine.cloud, &session, &memory, &mut report).await?;
            restart_switch(&session, &memory, arguments, &mut report).await?;
            if arguments.keep {
                report.step("keep", "both guests go on running; the next start adopts them");
                return Ok(ExitCode::SUCCESS);
            }
            let web = replace_web(&session, &memory, &mut report).await?;
            bill(&session, &memory, web, &mut report).await?;
            clean_up(&session, &machine, &memory, web, &mut report).await?;
            std::fs::remove_file(&page).map_err(machine::io)?;
            machine.close().await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What the story must remember over the death of its process. Everything else is asked from the cloud.
#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    organization: Id<Organization>,
    project: Id<Project>,
    web: Id<Instance>,
    client: Id<Instance>,
    volume: Id<Volume>,
    web_port: Id<Port>,
    client_port: Id<Port>,
    image: Id<Image>,
    size: Id<InstanceType>,
    book: Id<PriceBook>,
    nonce: String,
    boot_ids: [String; 2],
    quiet: Seen,
    killed_at: f64,
}

impl Memory {
    fn read(page: &PathBuf) -> Result<Option<Self>> {
        match std::fs::read(page) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::internal("memory lost").because(&e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(machine::io(e)),
        }
    }

    fn write(&self, page: &PathBuf) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::internal("memory lost").because(&e))?;
        std::fs::write(page, text).map_err(machine::io)
    }
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
    explain_drop(me, ports[1], addresses[0], report).await?;

    // The quiet period that later gaps are measured against.
    at_client.line("TICK", BOOT).await?;
    let from = gaps::uptime(&at_client).unwrap_or(0.0);
    report.waiting("five quiet seconds");
    gaps::reach(&mut at_client, from + PERIOD).await?;
    let quiet = gaps::between(&at_client, from, from + PERIOD)?;
    report.step("quiet", shown(quiet));
    let boot_id = |line: &str| value(line, "boot_id").unwrap_or_default().to_owned();
    let boot_ids = [boot_id(&web_boot), boot_id(&client_boot)];
    let killed_at = gaps::uptime(&at_client).unwrap_or(0.0);
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
        quiet,
        killed_at,
    })
}

async fn explain_drop(
    me: &Session,
    from: Id<Port>,
    dst: std::net::IpAddr,
    report: &mut Report,
) -> Result<()> {
    let packet = PacketQuery { from, src: None, dst, protocol: 6, src_port: 40000, dst_port: 81 };
    let trace = me.explain_packet(packet).await?;
    machine::ensure(trace.verdict == Verdict::Dropped, || format!("explain disagrees: {trace:?}"))?;
    let stages: Vec<_> = trace.stages.iter().map(|s| format!("{}: {}", s.stage, s.because)).collect();
    report.step("explain", stages.join(" → "));
    Ok(())
}

async fn adopt(cloud: &Cloud, me: &Session, memory: &Memory, report: &mut Report) -> Result<()> {
    let mut at_client = Guest::follow(me, memory.client);
    report.waiting("control is back and looks for its guests");
    for (id, boot_id, name) in
        [(memory.web, &memory.boot_ids[0], "web"), (memory.client, &memory.boot_ids[1], "client")]
    {
        let mut guest = Guest::follow(me, id);
        let from = guest.now().await?;
        let alive = guest.line_after(from, "ALIVE boot_id", BOOT).await?.1;
        machine::ensure(value(&alive, "boot_id") == Some(boot_id), || {
            format!("{name} was started anew: {alive}")
        })?;
        report.step("adopted", format!("{name}: {alive}"));
    }
    machine::ensure(cloud.orphans_removed() == 0, || "a sweep removed something".to_owned())?;
    gaps::reach(&mut at_client, memory.killed_at + PERIOD).await?;
    let seen = gaps::between(&at_client, memory.killed_at, memory.killed_at + PERIOD)?;
    report.step("gap", format!("control killed: {}; quiet: {}", shown(seen), shown(memory.quiet)));
    report.figure("gap.control", serde_json::json!({ "killed": seen, "quiet": memory.quiet }));
    Ok(())
}

async fn restart_switch(
    me: &Session,
    memory: &Memory,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<()> {
    let mut at_client = Guest::follow(me, memory.client);
    at_client.line("TICK", BOOT).await?;
    let from = gaps::uptime(&at_client).unwrap_or(0.0);
    let old = supervise::roles("switch", &arguments.state);
    machine::ensure(!old.is_empty(), || "there is no switch to kill".to_owned())?;
    old.iter().try_for_each(|pid| machine::kill(*pid))?;
    gaps::reach(&mut at_client, from + PERIOD).await?;
    let new = supervise::roles("switch", &arguments.state);
    machine::ensure(!new.is_empty() && new != old, || format!("the switch was not started again: {new:?}"))?;
    let seen = gaps::between(&at_client, from, from + PERIOD)?;
    report.step("gap", format!("switch killed: {}; quiet: {}", shown(seen), shown(memory.quiet)));
    report.figure("gap.switch", serde_json::json!({ "killed": seen, "quiet": memory.quiet }));
    Ok(())
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

async fn bill(me: &Session, memory: &Memory, web: Id<Instance>, report: &mut Report) -> Result<()> {
    let project = me.projects().get(memory.project).await?;
    let mut client = Guest::follow(me, memory.client);
    let before = client.ask("stats", "NETSTAT").await?;
    let bill = me.bill_so_far(memory.project, project.meta.created).await?;
    let after = client.ask("stats", "NETSTAT").await?;
    for line in &bill.lines {
        let name = format!("{} {}", line.resource.kind, &line.resource.id.to_string()[24..]);
        let amount = format!("{:>22} {:<9} × {:>8}", line.quantity, line.unit, line.unit_price);
        report.step(
            "bill",
            format!("{name:<28} {:<13} {amount} = {} {}", line.meter, line.cost, bill.currency),
        );
    }
    report.step("bill", format!("total {} {}", bill.total, bill.currency));
    report.step("bytes", machine::check_bytes(&bill, memory.client_port, &before, &after)?);
    let entries = me.audit().entries().await?;
    let index = entries.iter().position(|e| e.object == web.object()).unwrap_or(0) as u64;
    let (leaf, proof, checkpoint) = me.audit().prove(index).await?;
    proof.verify(&leaf, &checkpoint.root())?;
    let proved = format!(
        "entry {index} ({}) is proved to be in it",
        entries[usize::try_from(index).unwrap_or(0)].action
    );
    report.step("audit", format!("{} entries, root {}; {proved}", checkpoint.size(), checkpoint.root()));
    Ok(())
}

async fn clean_up(
    me: &Session,
    machine: &machine::Machine,
    memory: &Memory,
    web: Id<Instance>,
    report: &mut Report,
) -> Result<()> {
    report.waiting("everything is deleted");
    let (a, b) = (me.instances().delete(web).await?, me.instances().delete(memory.client).await?);
    a.wait().await?;
    b.wait().await?;
    report.step("e2fsck", machine.check_volume(memory.volume)?);
    me.volumes().delete(memory.volume).await?.wait().await?;
    machine::delete_all(me, memory.project).await?;
    me.projects().delete(memory.project).await?;
    me.organizations().delete(memory.organization).await?;
    me.instance_types().delete(memory.size).await?;
    me.price_books().delete(memory.book).await?;
    machine::ensure(machine.cloud.orphans_removed() == 0, || "a sweep removed something".to_owned())?;
    report.step("deleted", "instances, volume, ports, subnets, network, group, image, project, organization");
    Ok(())
}

fn shown(seen: Seen) -> String {
    format!(
        "longest gap {:.0} ms, slowest connect {:.0} ms, {} fetches ({} failed)",
        seen.gap_ms, seen.connect_ms, seen.fetches, seen.failed
    )
}

/// A guest under emulation needs seconds to boot, on a busy machine many.
const BOOT: Duration = Duration::from_secs(60);
/// Seconds of the guest's own clock that a gap is looked for in.
const PERIOD: f64 = 5.0;
