//! Whom the guests talk to: this process, through the lab's own network stack on the host's side of the TAP.

use std::io;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::process::Command;
use std::thread;

use crate::Result;

/// Gives the TAP its address and serves there: port 7001 takes bytes until their end, port 7002 gives bytes without end.
pub(crate) fn start(tap: &str) -> Result<()> {
    ip(&["addr", "add", &format!("{ADDRESS}/24"), "dev", tap])?;
    ip(&["link", "set", tap, "up"])?;
    serve(7001, |stream| io::copy(stream, &mut io::sink()).map(drop))?;
    serve(7002, |stream| {
        let chunk = vec![7; 64 << 10];
        loop {
            stream.write_all(&chunk)?;
        }
    })
}

fn ip(words: &[&str]) -> Result<()> {
    match Command::new("ip").args(words).status()?.success() {
        true => Ok(()),
        false => Err(format!("`ip {}` failed", words.join(" ")).into()),
    }
}

fn serve(port: u16, work: fn(&mut TcpStream) -> io::Result<()>) -> Result<()> {
    let listener = TcpListener::bind((ADDRESS, port))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A guest that is gone ends its connection by no fault of ours.
            thread::spawn(move || work(&mut stream));
        }
    });
    Ok(())
}

const ADDRESS: &str = "10.77.0.1";
