// Options from a JSON file: `--options FILE.json`.
#pragma once

namespace CLI {
class App;
}

namespace gdn::cli {

/// Adds --options to a command whose other options are declared. The file holds one object whose
/// keys are the names of the options, with - or _ ("seq-len", "seq_len"); lists stand for several
/// values, true and false for flags, null and [] for an option that is not given. What is given on
/// the command line wins. An unknown key is a usage error that names it.
void add_options_file(CLI::App& app);

}  // namespace gdn::cli
